"""Healing in closed form: the linears that stay are refitted by least squares towards the dense stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from billhook.anatomy.discover import READ_LATER
from billhook.anatomy.types import Anatomy, Stack
from billhook.data import Windows
from billhook.heal.gaps import require_own_weights
from billhook.heal.healing import Healing, require_no_channels, require_no_masks
from billhook.heal.refit.bridge import before_gaps
from billhook.heal.refit.channel_form import channel_form
from billhook.heal.refit.low_rank import require_linears
from billhook.heal.refit.peers import peers_of
from billhook.heal.refit.places import places
from billhook.heal.refit.stepping import Stepper
from billhook.heal.refit.verdict import judged
from billhook.heal.refit.walk import Walk
from billhook.heal.refit.widths import whole
from billhook.measure.batches import Batch, batches_of
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.surgery.factorise import factors_of
from billhook.surgery.live import channels_of, drops_of, keeps_of

Progress = Callable[[str, int, int], None]


def closed_form(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan | Iterable[Address],
    source: Windows | Iterable[Batch],
    progress: Progress | None = None,
) -> Healing:
    """New weights by least squares for the linears of what ``plan`` leaves of ``model``, so that the stream comes out
    as in the dense one. The model stays as it is.

    Two residual streams walk through the stack side by side, the dense one and that of the cut model as healed so far.
    Where a sublayer stays, its write linear (o or down projection) is refitted: with its inputs h in the cut model, and
    r what the cut stream after it lacks of the dense stream *where the next sublayer that stays reads it*, the change D
    of its weights minimises

        sum over tokens of w |r - D h|^2 + penalty |D|^2,    w = 1 / |dense stream|^2.

    So the last sublayer before a gap aims at the far side of it, and those after it take up what is left. A sublayer
    that gets narrower is a gap of its own: h is then what the channels have that stay, and r what the others wrote. A
    bias is refitted too, none is made. The weights w matter: without them a few tokens with huge streams (the first of
    a text) decide. (Demo model, six blocks gone, writes only: perplexity 33.8 with them, 35.4 without; on C4 61.3 and
    70.5.)

    Behind the first gap the reads (q, k, v; gate, up) come before that, together: with x what they are given in the cut
    model and z what the dense sublayer was given, the D that minimises the error of x D against z - x, with
    w = 1 / |z|^2 and a penalty, is folded into each of them, so that they read x + x D.

    Penalties are chosen on the last eighth of the windows, which no fit ever sees, so that what is said about them
    stays honest down to the last block; where no penalty helps there, the old weights stay. Refitting what is left of a
    layer by least squares is an old idea (He et al. 2017, arXiv 1707.06168, section 3.1); that a removed run of blocks
    can be the target is that of ReplaceMe (arXiv 2505.02819), which fits one linear map for one run.

    Where a norm stands between the writes and the stream (sandwich norms), it is what is refitted, channel by channel:
    with y what it puts out, its gain g becomes g (1 + d) with the d that minimises the error of d y against r, with the
    weights of writes and a penalty. (Tried on the demo model, which has no such norms, by a throwaway script: blocks 12
    to 17 gone, 4,096 tokens, reads refitted and all that is written only so, without grafts: divergence 0.77 as cut,
    0.63 healed; 1.23, so refused, with reads alone.) Not where linears are taken apart: on a random model with such
    norms that came out further from the dense one than reads alone.

    MLPs beside a gap may take neurons of dropped ones (``graft``): of the neurons of both, as many are kept as there
    were, those with which the write does best (the optimal brain surgeon's choice), where that lowers the held-back
    error more than refitting the write alone. What the dropped one was given is guessed as for the reads. All of a gap
    offer theirs, one after the other, to the MLP before it, which writes the most of what is missing; to the one after
    it the nearest does. One that gets narrower takes none. (Demo model, six blocks gone: the MLP before the gap ends
    with more neurons of the six than of its own.)

    A linear that becomes two, U of U'W, is taken as their product. Reads are folded into U'W; the change of a write is
    kept within what U puts out, so that U'W takes it up and U stays that of the plan.

    Hidden channels that are gone are a gap everywhere: see ``channel_form``.

    In the end the whole is judged on the windows that were held back: where the healed model is no nearer to the dense
    one than the cut one (by the divergence of what they predict, see ``divergence``), the healing is refused.

    Left alone, with the reason: writes that are fused experts, and those whose output is not simply added to the stream
    (behind sandwich norms; in post-norm models, whose norms act on the stream itself). The result is an ordinary model
    of the same architecture.

    Cost: the dense blocks once, those behind the first gap twice more, and for each regression on i inputs and each
    penalty i^3 / 3 multiplications; for each MLP that offers n neurons 8 n^3 or so. Memory: the model, two streams
    [tokens, hidden], what the linears of one place are given, and as much as a stream for each MLP of the gap that is
    being crossed (six at most); new weights lie in files (``on_disk``). Raises InputError for cuts in more than one
    stack, blocks that read the keys and values of others, fewer than two windows, and where a stream is not finite.

    Under ``accelerate launch`` all processes call this together, each with the model on its device, and each walks its
    share of the windows: of those to fit on as of those held back every n-th. The sums of a regression are added over
    all and the first process solves it. So the result is that of one process but for rounding, and all return it.
    (Batches that are no windows are not shared out.) Cost and memory: the streams and what linears are given are
    shared out; the model, the sums and the time for solving are not. Raises InputError, in all of them, where one does,
    and for more processes than windows to fit on.
    """
    return _walked(model, anatomy, plan, source, progress, bridges=False)


def bridge(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan | Iterable[Address],
    source: Windows | Iterable[Batch],
    progress: Progress | None = None,
) -> Healing:
    """As ``closed_form``, and behind each block that whole blocks are gone after stands a bridge: a map of low rank
    that leads what is left of the stream h to the far side of the gap, h + B A h (see ``bridge.fitted``).

    For models in which nothing can be folded into what writes, since norms stand behind it or act on the stream itself.
    ReplaceMe (arXiv 2505.02819) fits a full map for a run of blocks and folds it into the linear before; what cannot be
    folded stays beside, so the rank is an eighth of the stream's width: about 2% of a block. (A choice of ours, as is
    that it stands behind refitted writes, where there are any.)

    The result is no longer of the stock class, and has more parameters than its plan says (``Healing.beside``). A gap
    at the very beginning has no block before it, and gets none. InputError for a plan without such a gap, and for
    narrower streams.
    """
    require_no_channels(plan, "bridge")
    return _walked(model, anatomy, plan, source, progress, bridges=True)


def _walked(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan | Iterable[Address],
    source: Windows | Iterable[Batch],
    progress: Progress | None,
    bridges: bool,
) -> Healing:
    require_no_masks(plan, "healing")
    require_healable(anatomy, plan)
    require_linears(plan, anatomy)
    peers = peers_of(source, model)
    with peers.together():
        mine = peers.windows(source) if isinstance(source, Windows) else source
        if channels_of(plan, anatomy):
            return channel_form(model, anatomy, plan, mine, progress, peers)
        drops, keeps, factors = drops_of(plan, anatomy), keeps_of(plan, anatomy), factors_of(plan, anatomy)
        stack = stack_of(anatomy, [*drops, *(keep.unit for keep in keeps), *(factor.edit.unit for factor in factors)])
        stepper = Stepper(model, stack, list(batches_of(mine, model)))
        run = places(stack)
        gaps = before_gaps(stack, run, drops) if bridges else frozenset()
        if bridges and not gaps:
            raise InputError("a bridge leads across a gap of whole blocks, from the block before it; the plan has none")
        walk = Walk(model, anatomy, stepper, drops, keeps, peers, factors, gaps)
        walk.through(run, progress)
        tensors = peers.same(whole(model, anatomy, keeps, walk.tensors))
        healing = Healing(tensors, tuple(walk.refits), walk.left_alone, walk.tokens, walk.work, tuple(walk.grafts))
        smaller = Plan.of(drops, keeps=keeps).factorised({f.edit: f.basis.numpy() for f in factors})
        return judged(model, anatomy, stepper, walk.held, smaller, healing, peers)


def require_healable(anatomy: Anatomy, plan: object = None) -> None:
    """InputError for a model in which the streams cannot be walked block by block, and for a plan after which blocks
    share weights: what is good for one of them is not for the other."""
    require_own_weights(plan)
    if READ_LATER in anatomy.outline.pinned.values():
        raise InputError(
            f"a {anatomy.family} model cannot be healed: some blocks read keys and values of earlier ones; "
            f"--heal none leaves it as cut"
        )


def stack_of(anatomy: Anatomy, units: Iterable[Address]) -> Stack:
    """The one stack in which something is cut; the first one where nothing is."""
    names = sorted({address.stack for address in units})
    if len(names) > 1:
        raise InputError(f"healing takes one stack at a time; the plan cuts units of {' and '.join(names)}")
    return anatomy.stack(names[0]) if names else anatomy.stacks[0]
