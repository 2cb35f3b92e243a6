"""Small real things that every room's tests need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: every xdist worker has one core

import pytest
import torch
from families import build, randomise
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, dynamic_module_utils
from transformers.utils import logging

from billhook.models import locate
from billhook.plan.errors import InputError

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
# a crowded machine must not fail a property
settings.register_profile("billhook", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("billhook")


@pytest.fixture(scope="session", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remote code of the checkpoints that tests load stays out of the user's own cache. One place for a whole process:
    Python remembers where it found a package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def make_tokenizer(add_bos: bool = False, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the spot on the built-in text."""
    from billhook.data.builtin import builtin

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(builtin().parts[:50], trainer)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """300 tokens; adds no BOS, as the demo model's does not."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random causal model: 5 blocks, tied, float32, with tokenizer and chat template.

    Read only: load it afresh in each test.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny-lm"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    return save_tiny("llama", tokenizer, folder)


@pytest.fixture(scope="session")
def tiny_mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random mixture of experts, with a tokenizer. Read only, as the one above."""
    return save_tiny("mixtral", make_tokenizer(), tmp_path_factory.mktemp("models") / "tiny-mixture")


def save_tiny(family: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """A tiny random model of a family that speaks the tokenizer's tokens, and the tokenizer."""
    model = build(family)
    model.resize_token_embeddings(len(tokenizer))
    randomise(model)
    model.config.max_position_embeddings = 512
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The folder of the demo model, downloaded on the first use of the machine's cache."""
    try:
        return locate("demo")
    except InputError as error:
        pytest.skip(f"no demo model: {error}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets that lies beside the project where it is developed."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: this test needs the public data sets")
    return folder
