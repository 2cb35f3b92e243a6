"""What does it cost to let the tokens of an image step around blocks? Accuracy of a small trained multimodal model
(llava-mnist of the shared models) on digits it has not seen, against the FLOPs of its decoder: mixture-of-depths
with trained routers, tokens picked at random, and whole blocks left out for every token.

    python benchmarks/mod_figures.py [MODEL] [IMAGES] [STEPS] [RATIOS] [BATCH]
                                     (default: llava-mnist 2000 120 0.5,0.25 32)

Routers learn on the last 2,048 images of the training set, from the model's own answers, in batches of BATCH; the
model has seen those images. Every line is held against the untouched model on the same images, with a 95 %
interval of the difference. A pass reads an image of 16 tokens and a question of 9. Minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from protocol import DATA
from torch import Tensor
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedModel

from billhook.anatomy import Anatomy, discover
from billhook.anatomy.modality import vision_tokens
from billhook.evaluate.intervals import mean_interval
from billhook.measure.cost import CostModel
from billhook.runtime.attached import Attached
from billhook.runtime.attention_rank import attention_ranks
from billhook.runtime.counts import Counts
from billhook.runtime.depth_routers import DepthRouters, kept_shares
from billhook.runtime.images import Images
from billhook.runtime.mixture_of_depths import Depths, MixtureOfDepths
from billhook.runtime.silence import idle_params
from billhook.runtime.static_skip import StaticSkip

MODEL = DATA.parent / "models" / "llava-mnist"
QUESTION = "what digit is this ? the digit is"
DIGITS = "zero one two three four five six seven eight nine"
PATCHES, AT_ONCE, LEARNT, BLOCKS = 16, 250, 2048, "1-3"


class AtRandom(DepthRouters):
    """Picks each token by a draw, and weighs none."""

    def score(self, block: int, stream: Tensor) -> Tensor:
        return torch.rand(stream.shape[:2])

    def level(self, block: int, ratio: float) -> float:
        return 1 - ratio

    def handed_on(self, stream: Tensor, after: Tensor, score: Tensor, runs: Tensor) -> Tensor:
        return torch.where(runs[..., None], after, stream)


def main(
    source: str = str(MODEL), images: str = "2000", steps: str = "120", ratios: str = "0.5,0.25", batch: str = "32"
) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer, anatomy = AutoTokenizer.from_pretrained(source), discover(model)
    read = tokenizer.convert_tokens_to_ids
    ids = torch.tensor([tokenizer.bos_token_id, *vision_tokens(model) * PATCHES, *read(QUESTION.split())])
    words = torch.tensor(read(DIGITS.split()))
    data = np.load(DATA / "mnist.npz")
    seen, (shown, labels) = pixels(data["x_train"][-LEARNT:]), (pixels(data["x_test"]), torch.tensor(data["y_test"]))
    shown, labels = shown[: int(images)], labels[: int(images)].long()
    batches = [{"input_ids": ids.expand(len(some), -1), "pixel_values": some} for some in torch.split(seen, int(batch))]

    @torch.no_grad()
    def right() -> np.ndarray:
        """Whether each image was read as the digit that it is."""
        parts = [
            model(input_ids=ids.expand(len(some), -1), pixel_values=some).logits[:, -1].argmax(-1) == words[wanted]
            for some, wanted in zip(torch.split(shown, AT_ONCE), torch.split(labels, AT_ONCE), strict=True)
        ]
        return torch.cat(parts).double().numpy()

    def show(name: str, attach: Callable[[], Attached]) -> None:
        with attach() as attached:
            found = right()
        left = work(attached.counts, model, anatomy, len(ids))
        print(f"{name:<44}{left:>7.1%}{found.mean():>9.2%}  {difference(found - plain)}", flush=True)

    ranks = attention_ranks(model, batches)
    print("rank of attention maps, block by block:", ", ".join(f"{rank:.2f}" for rank in ranks))
    print(f"{'':<44}{'FLOPs':>7}{'right':>9}  against the untouched model")
    plain = right()
    print(f"{'untouched':<44}{1:>7.1%}{plain.mean():>9.2%}", flush=True)
    for decay in (True, False):
        policy = MixtureOfDepths(tokens="vision", blocks=BLOCKS, decay=decay, steps=int(steps))
        policy = policy.fitted_on(model, anatomy, batches)
        kind = "falling" if decay else "even"
        for ratio in map(float, ratios.split(",")):
            show(f"routed, {kind} shares, ratio {ratio:g}", partial(policy.turned(ratio).attach, model, anatomy))
            show(
                f"at random, {kind} shares, ratio {ratio:g}",
                partial(drawn, model, anatomy, BLOCKS, ratio, decay),
            )
    for block in range(1, len(ranks)):
        show(f"block {block} left out for every token", partial(static(block).attach, model, anatomy))
        show(f"block {block} left out for the image", partial(drawn, model, anatomy, str(block), 0.0, False))


def static(block: int) -> StaticSkip:
    return StaticSkip(units=f"decoder.{block}")


def drawn(model: PreTrainedModel, anatomy: Anatomy, which: str, ratio: float, decay: bool) -> Attached:
    """The same shares of the tokens of an image in these blocks as under the policy, picked by draws."""
    torch.manual_seed(0)
    blocks = MixtureOfDepths(blocks=which).converted(anatomy)
    shares = dict(zip(blocks, kept_shares(len(blocks), ratio, decay=decay), strict=True))
    counts = Counts()
    fit = Depths(model, anatomy, AtRandom(torch.zeros(0), torch.zeros(0)), shares, Images(model), counts).fit
    return Attached(model, "at random", counts, fit)


def work(counts: Counts, model: PreTrainedModel, anatomy: Anatomy, tokens: int) -> float:
    """FLOPs of the blocks of the decoder in one pass over so many tokens, as a share of the untouched model's."""
    costs, whole, ran = CostModel(anatomy.outline, prompt_tokens=tokens, new_tokens=0), 0.0, 0.0
    for sub in (sub for block in anatomy.stack("decoder").blocks for sub in block.sublayers):
        flops = costs.saving(sub.address)["flops"]
        whole += flops
        ran += counts.share_run(sub.address) * flops
        if projected := counts.share_projected(sub.address):
            ran += projected * (flops - 2 * idle_params(model, sub) * tokens)
    return ran / whole


def difference(by_image: np.ndarray) -> str:
    """In points, with a 95 % interval over images."""
    mean = mean_interval(by_image)
    return f"{100 * mean.value:+.2f} ({100 * mean.low:+.2f} to {100 * mean.high:+.2f})"


def pixels(images: np.ndarray) -> Tensor:
    return (torch.from_numpy(images[:, None].astype(np.float32)) / 255 - 0.5) / 0.5


if __name__ == "__main__":
    main(*sys.argv[1:])
