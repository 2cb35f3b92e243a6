import pytest
import torch
from families import VOCABULARY, build
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from billhook.evaluate import PROMPTS, generate, generations
from billhook.evaluate.generations import repetition
from billhook.plan.errors import InputError

CHAT = "{% for m in messages %}w40 {{ m['content'] }} w41 {% endfor %}{% if add_generation_prompt %}w42{% endif %}"


def tokenizer(chat_template=None):
    words = {"<unk>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", chat_template=chat_template
    )


def by_hand(model, ids, steps):
    """Greedy decoding without cache."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, -steps:].tolist()


@pytest.fixture(scope="module")
def model():
    return build("llama")


def test_greedy_continuation_without_the_prompt(model):
    text = generate(model, tokenizer(), "w7 w8 w9", 6)
    assert text == tokenizer().decode(by_hand(model, [7, 8, 9], 6))
    assert len(text.split()) == 6


def test_chat_template_is_used_where_there_is_one(model):
    text = generate(model, tokenizer(CHAT), "w7 w8", 6)
    assert text == tokenizer().decode(by_hand(model, [40, 7, 8, 41, 42], 6))


@pytest.mark.parametrize(
    ("template", "adds_bos", "begun"),
    [
        (None, True, [1, 7, 8]),
        (None, False, [7, 8]),
        ("<bos> " + CHAT, True, [1, 40, 7, 8, 41, 42]),
        ("<bos> " + CHAT, False, [1, 40, 7, 8, 41, 42]),
        (CHAT, True, [40, 7, 8, 41, 42]),
    ],
)
def test_one_bos_where_the_tokenizer_says_so(model, template, adds_bos, begun):
    """The template has the say where there is one; never two."""
    asked = tokenizer(template)
    asked.add_special_tokens({"bos_token": "<bos>"})
    if adds_bos:
        asked.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    seen = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0][0].tolist()))
    generate(model, asked, "w7 w8", 1)
    hook.remove()
    assert seen[0] == begun


def test_stored_settings_do_not_spoil_greedy():
    """And leave the model's own settings alone."""
    model = build("llama")
    plain = generate(model, tokenizer(), "w7 w8 w9", 12)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, num_beams=3, top_p=0.3)
    stored = model.generation_config.to_dict()
    assert generate(model, tokenizer(), "w7 w8 w9", 12) == plain
    assert model.generation_config.to_dict() == stored


def test_ends_at_the_end_of_sequence():
    model = build("llama")
    expected = by_hand(model, [7, 8, 9], 6)
    model.generation_config.eos_token_id = expected[2]
    assert len(generate(model, tokenizer(), "w7 w8 w9", 6).split()) == 3


def test_encoder_decoders_write_too():
    assert generate(build("t5"), tokenizer(), "w7 w8 w9", 4)


def test_what_the_positions_cannot_hold_is_refused(model):
    limit = model.config.max_position_embeddings
    assert len(generate(model, tokenizer(), "w7 w8", limit - 2).split()) == limit - 2
    with pytest.raises(InputError) as caught:
        generate(model, tokenizer(), "w7 w8", limit - 1)
    assert f"max_new_tokens is {limit - 1}, but LlamaForCausalLM has {limit} positions" in str(caught.value)
    assert f"the prompt takes 2; at most {limit - 2} fit" in str(caught.value)


def test_side_by_side(model):
    other = build("llama_bias")
    pairs = generations(model, other, tokenizer(), ["w7 w8", "w9"], max_new_tokens=3)
    assert [pair.prompt for pair in pairs] == ["w7 w8", "w9"]
    assert pairs[1].dense == generate(model, tokenizer(), "w9", 3)
    assert pairs[1].compressed == generate(other, tokenizer(), "w9", 3)


def test_three_prompts_by_default(model):
    assert len(generations(model, model, tokenizer(), max_new_tokens=1)) == len(PROMPTS) == 3


def test_training_flags_are_left_alone():
    model = build("llama").train()
    generate(model, tokenizer(), "w7", 1)
    assert all(module.training for module in model.modules())


def test_refusals(model):
    with pytest.raises(InputError, match="BertForMaskedLM cannot generate text"):
        generate(build("bert"), tokenizer(), "w7")
    with pytest.raises(InputError, match="needs a tokenizer"):
        generate(model, None, "w7")
    with pytest.raises(InputError, match="prompt '' has no tokens"):
        generate(model, tokenizer(), "")
    with pytest.raises(InputError, match="max_new_tokens is 0; it must be at least 1"):
        generate(model, tokenizer(), "w7", 0)


def test_repetition_of_a_batch_is_that_of_each_prompt_alone(model):
    """The shorter prompts are padded on the left; what comes after the end of a text does not count."""
    prompts, ids = ("w7 w8 w9", "w5", "w30 w31"), ([7, 8, 9], [5], [30, 31])
    alone = [by_hand(model, prompt, 12) for prompt in ids]
    share = [1 - len({tuple(t[i : i + 4]) for i in range(9)}) / 9 for t in alone]
    assert repetition(model, tokenizer(), prompts, max_new_tokens=12) == pytest.approx(sum(share) / 3)
    ends = alone[0][3]
    model.generation_config.eos_token_id = [ends]
    try:
        cut = [text[: text.index(ends)] if ends in text else text for text in alone]
        grams = [[tuple(t[i : i + 4]) for i in range(len(t) - 3)] for t in cut]
        share = [1 - len(set(g)) / len(g) if g else 0.0 for g in grams]
        assert len(cut[0]) <= 3 and repetition(model, tokenizer(), prompts, max_new_tokens=12) == pytest.approx(
            sum(share) / 3
        )
    finally:
        model.generation_config.eos_token_id = None
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        repetition(model, tokenizer(), prompts, max_new_tokens=0)
