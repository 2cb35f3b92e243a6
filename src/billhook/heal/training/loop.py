"""The loop of a training: steps, looks, and a state that survives a crash."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from billhook.heal.held import held_windows
from billhook.heal.training.damage import sample
from billhook.heal.training.drawing import lap, lap_length
from billhook.heal.training.kv_routing import Routes
from billhook.heal.training.launch import require_precision, sharded
from billhook.heal.training.methods import Training
from billhook.heal.training.random_skips import stepped_around
from billhook.heal.training.sharding import part, whole
from billhook.heal.training.state import keep, kept
from billhook.heal.training.student import Student
from billhook.heal.training.subject import Subject
from billhook.plan.errors import InputError
from billhook.plan.record import Look, TrainingRecord

Progress = Callable[[str, int, int], None]
Moments = MutableMapping[Tensor, dict[str, Tensor]]  # by parameter that is trained
HELD_BACK_TOKENS = 4096  # enough to tell two states of one model apart
LONGEST = 1.0  # norm of a gradient; longer ones are shortened
FORMAT = 2  # of the state; one in another format is refused
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Loop:
    """One training of a student over windows ``ids`` [n, length], as far as it has come. ``facts`` say whose it is.
    ``weights``: how often each window that is not held back is to be read (see ``lap``). ``routes``: where keys
    and values can go, if the training is to send them there."""

    def __init__(
        self,
        student: Student,
        ids: Tensor,
        training: Training,
        tokens: int,
        state: Path,
        facts: Mapping[str, Any],
        progress: Progress | None,
        weights: Tensor | None = None,
        routes: Routes | None = None,
    ) -> None:
        on_cpu = ids.device.type == "cpu"
        require_precision(student.dense.dtype)
        self._sharded = sharded()
        self.accelerator = Accelerator(cpu=on_cpu, device_placement=False)
        self._student, self._training, self._state, self._progress = student, training, state, progress
        self.fit, self._held = split(ids)
        self._weights, self._routes = weights, routes
        self._wrapped: nn.Module = student
        self._steps = max(1, tokens // (training.rows * ids.shape[1]))
        self._every = math.ceil(self._steps / training.checks)
        self._facts = {"format": FORMAT, **facts}
        self.curve: list[Look] = []
        if training.rows % self.accelerator.num_processes:
            raise InputError(
                f"{training.rows} windows a step cannot be shared by {self.accelerator.num_processes} processes"
            )

    def mesh(self) -> DeviceMesh | None:
        """A new one over all processes, where each is to hold a part of every block."""
        if not self._sharded:
            return None
        return init_device_mesh(self.fit.device.type, (self.accelerator.num_processes,))

    def through(self, subject: Subject) -> tuple[dict[str, Tensor], TrainingRecord]:
        """Go on to the end; the new tensors by name in the smaller model (none where the untouched model was the best),
        and the record."""
        holder, layers = subject.holder, subject.layers
        best, moments = self._resume(subject)
        if not self.curve:
            self.curve.append(Look(step=0, loss=None, held=self._look(subject)))
            best = holder.snapshot()
        losses: list[float] = []
        optimizer: torch.optim.Optimizer | None = None
        for step in range(self.curve[-1].step, self._steps):
            if self._ended():
                break
            if layers is not None and step % self._training.period == 0:
                layers.choose(step // self._training.period, sample(self.fit, self._rows(step)))
                optimizer = None
            if optimizer is None:
                optimizer = self._begun(subject, moments)
                moments = optimizer.state
            for group in optimizer.param_groups:
                group["lr"] = self._rate(step)
            with self._disturbed(f"step {step}"):
                loss = self._wrapped(self.fit[self._mine(self._rows(step))])
            optimizer.zero_grad()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_([p for p in holder.parameters.values() if p.grad is not None], LONGEST)
            optimizer.step()
            losses.append(self._mean(loss.detach()))
            if self._progress is not None:
                self._progress("training", step + 1, self._steps)
            if (step + 1) % self._every == 0 or step + 1 == self._steps:
                look = Look(step=step + 1, loss=sum(losses) / len(losses), held=self._look(subject))
                losses = []
                if look.held < min(seen.held for seen in self.curve):
                    best = holder.snapshot()
                self.curve.append(look)
                self._keep(subject, moments, best)
        record = self._record(subject)
        return holder.outcome(best) if record.best else {}, record

    def _begun(self, subject: Subject, moments: Moments) -> torch.optim.Optimizer:
        """An optimizer for what is trained from now on; what was trained until now goes on with its ``moments``."""
        asking = [parameter for parameter in subject.holder.parameters.values() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(asking, lr=self._training.rate, weight_decay=0.0)
        optimizer.state.update({parameter: moments[parameter] for parameter in asking if parameter in moments})
        if self.accelerator.num_processes > 1 and not self._sharded:
            some = subject.layers is not None or self._training.skips > 0 or self._routes is not None
            self._wrapped = self._student
            gc.collect()  # the last one, which lies in a cycle with a copy of its gradients
            # averages gradients of what asks for one now, and of nothing that comes later
            self._wrapped = DistributedDataParallel(self._student, find_unused_parameters=some, init_sync=False)
        return optimizer

    def _record(self, subject: Subject) -> TrainingRecord:
        best = min(self.curve, key=lambda look: look.held)
        return TrainingRecord(
            trains=self._training.trains,
            goal=self._training.goal,
            parameters=subject.count,
            ranks=subject.ranks,
            tokens_a_step=self._training.rows * self.fit.shape[1],
            held_tokens=self._held.numel(),
            curve=tuple(self.curve),
            best=best.step,
            stopped_early=self.curve[-1].step < self._steps,
        )

    def _rows(self, step: int) -> list[int]:
        """The windows of a step: a lap over all in random order, then one in another order, and so on."""
        count, many, seed = len(self.fit), self._training.rows, self._training.seed
        places = [divmod(p, lap_length(count, self._weights)) for p in range(step * many, (step + 1) * many)]
        laps = {number: lap(count, self._weights, seed, number) for number, _ in places}
        return [laps[number][within] for number, within in places]

    def _mine(self, rows: list[int]) -> list[int]:
        return rows[self.accelerator.process_index :: self.accelerator.num_processes]

    def _rate(self, step: int) -> float:
        warm = max(1, round(self._training.warmup * self._steps))
        if step < warm:
            return self._training.rate * (step + 1) / warm
        along = (step - warm) / max(1, self._steps - warm)
        return self._training.rate * (0.1 + 0.9 * (1 + math.cos(math.pi * along)) / 2)

    @torch.no_grad()
    def _look(self, subject: Subject) -> float:
        """The mean loss over the held-back windows, of the model as it would be saved now."""
        total = torch.zeros((), dtype=torch.float64, device=self._held.device)
        count, together = len(self._held), self.accelerator.num_processes
        turns = range(self.accelerator.process_index, -(-count // together) * together, together)
        with subject.holder.saved():
            for turn in turns:  # as many for each process: shards are gathered by all at once
                row = turn % count
                with self._disturbed(f"held {row}"):
                    loss = self._student.parts(self._held[row : row + 1])[0].double()
                total += loss if turn < count else 0
        summed: Tensor = self.accelerator.reduce(total, reduction="sum")
        return summed.item() / len(self._held)

    @contextmanager
    def _disturbed(self, when: str) -> Iterator[None]:
        """What the student is to learn to bear: blocks missing, or keys and values of others."""
        training, draw = self._training, f"{self._training.seed} {when}"
        with ExitStack() as disturbances:
            disturbances.enter_context(stepped_around(self._student.blocks, training.skips, draw))
            if self._routes is not None:
                disturbances.enter_context(self._routes.drawn(training.routes, draw))
            yield

    def _mean(self, loss: Tensor) -> float:
        value: Tensor = self.accelerator.reduce(loss.double(), reduction="mean")
        if not value.isfinite():
            raise InputError("the loss of the training is not finite: the weights or the text are damaged")
        return value.item()

    def _ended(self) -> bool:
        """Whether the last looks brought nothing better."""
        held = [look.held for look in self.curve]
        return len(held) - 1 - held.index(min(held)) >= self._training.patience

    def _keep(self, subject: Subject, moments: Moments, best: Mapping[str, Tensor]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in subject.holder.parameters.items():
            found = {"now": parameter.detach(), **moments.get(parameter, {})}
            if name in best:
                found["best"] = best[name]
            for key, tensor in found.items():
                gathered = whole(tensor)
                if self.accelerator.is_main_process:
                    tensors[f"{key} {name}"] = gathered.cpu()
        if not self.accelerator.is_main_process:
            return
        curve = [look.model_dump() for look in self.curve]
        layers = subject.layers.facts if subject.layers is not None else None
        keep(self._state, tensors, {**self._facts, "curve": curve, "layers": layers, "names": subject.holder.names})

    def names(self) -> list[str] | None:
        """Of what a training that is gone on with trains; None for one that has not begun."""
        found = kept(self._state, self._facts)
        return None if found is None else found[1]["names"]

    def _resume(self, subject: Subject) -> tuple[dict[str, Tensor], Moments]:
        """The best state so far, and the moments."""
        found = kept(self._state, self._facts)
        if found is None:
            return {}, {}
        tensors, facts = found
        if subject.layers is not None:
            trained = {key.removeprefix("now ") for key in tensors if key.startswith("now ")}
            subject.layers.resume(facts["layers"], trained)
        best: dict[str, Tensor] = {}
        moments: Moments = {}
        with torch.no_grad():
            for name, parameter in subject.holder.parameters.items():
                parameter.copy_(part(tensors[f"now {name}"], parameter))
                if f"best {name}" in tensors:
                    best[name] = part(tensors[f"best {name}"], parameter)
                if f"step {name}" in tensors:
                    kinds = {key: tensors[f"{key} {name}"] for key in _MOMENTS}
                    moments[parameter] = {
                        key: tensor if key == "step" else part(tensor, parameter) for key, tensor in kinds.items()
                    }
        self.curve = [Look(**look) for look in facts["curve"]]
        return best, moments


def split(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The windows to learn from, and those held back: the last eighth, of a short text up to four."""
    kept_back = max(held_windows(len(ids)), min(4, len(ids) // 4))
    held = ids[len(ids) - kept_back :]
    return ids[: len(ids) - kept_back], held[: max(1, HELD_BACK_TOKENS // ids.shape[1])]
