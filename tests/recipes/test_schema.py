from pathlib import Path

import pytest

from billhook.plan.errors import InputError
from billhook.recipes.catalogue import DEFAULTS, DEFAULTS_UNIFORM, load, names, recipes, source_of
from billhook.recipes.choices import Greedy
from billhook.scores import SCORES

GOOD = "name: mine\ntitle: Mine\nunit: sublayer\nobjective: kl\nchoice: {word: greedy}\n"
EVOLVE = GOOD.replace("{word: greedy}", "{{word: evolve, generations: 2, offspring: 8, patience: 1, screens: [{}]}}")


def test_the_recipes_that_come_along() -> None:
    assert names()[:3] == [*DEFAULTS, *DEFAULTS_UNIFORM]
    assert {(load(n).act, load(n).heal) for n in names()[:3]} == {("drop", "closed-form")}
    assert set(names()) == {
        "sublayer-greedy",
        "evopress",
        "foldgpt-gates",
        "tinyfusion",
        "das",
        "finercut",
        "block-greedy",
        "block-influence",
        "angular-span",
        "relative-norm",
        "attention-drop",
        "mlp-drop",
        "block-drop",
        "joint-drop",
        "unified-skip",
        "additive-knapsack",
        "position-weighted",
        "static-skip",
        "fusegpt",
        "flatten-gpt",
        "checkfree",
        "branch-gains",
        "comp",
        "foldgpt",
        *("flap", "cfsp", "wanda-structured", "magnitude-neurons", "peak-magnitude-neurons", "amp", "fisher-width"),
        *("angular-widths", "measured-widths", "evopress-widths"),
        *("magnitude-sparse", "magnitude-2-4", "wanda", "wanda-2-4", "sparsegpt", "sparsegpt-2-4", "ecoflap"),
        *("svd", "asvd", "svd-llm", "low-rank", "maestro"),
        *("maskllm", "pst", "gradient-flow", "hesso", "feature-merging"),
        *("loraprune", "interchange-heads", "ofb", "random-width", "evenly-spaced-width"),
        *("hidden-channels", "minitron-channels", "random-channels", "evenly-spaced-channels"),
        *("expert-frequency", "m-smoe", "m-smoe-adaptive", "mc-smoe", "random-experts", "evenly-spaced-experts"),
        *("restore-layers", "lines"),
        "random",
        "evenly-spaced",
        "first",
        "last",
    }
    for name, recipe in zip(names(), recipes(), strict=True):
        assert recipe.name == name
        assert recipe.title
        assert recipe.paper or recipe.choice.word in ("random", "evenly-spaced", "first", "last")
        assert len(source_of(name).splitlines()) <= 25


def test_greedy_is_lazy_and_the_plain_one_of_the_benchmarks_is_not() -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    lazy, plain = load("sublayer-greedy").choice, load(benchmarks / "sublayer-greedy-plain.yaml").choice
    assert isinstance(lazy, Greedy) and isinstance(plain, Greedy)
    assert lazy.lazy and lazy.screen < 1
    assert not plain.lazy and plain.refine == 0


def test_scores_get_the_unit_of_the_recipe() -> None:
    assert load("block-influence").score_parameters == {"unit": "block"}
    assert load("relative-norm").score_parameters == {"unit": "block", "relative_to": "output"}
    assert load("random").score_parameters == {}
    assert {recipe.score.word for recipe in recipes() if recipe.score} <= set(SCORES)


def test_a_recipe_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    recipe = load(file)
    assert recipe.choice == Greedy(word="greedy", lazy=True, per="budget", refine=0.0)
    assert (recipe.act, recipe.heal) == ("drop", "none")
    file.write_text(source_of("relative-norm"))
    assert load(str(file)) == load("relative-norm")


def test_an_unknown_name_gets_the_list() -> None:
    with pytest.raises(
        InputError, match=r"recipe .shortgpt. is unknown; use a \.yaml file or one of angular-widths, sublayer-greedy"
    ):
        load("shortgpt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "colour: red\n", "colour: Extra inputs are not permitted"),
        (GOOD.replace("greedy}", "greedy, depth: 3}"), "choice.greedy.depth: Extra inputs are not permitted"),
        (GOOD.replace("greedy}", "best}"), "choice: Input tag 'best' found"),
        (
            GOOD.replace("greedy}", "one-shot}"),
            "one-shot, knapsack, widths and channels need a score, and no other choice has one",
        ),
        (GOOD + "score: {word: block-influence}\n", "need a score, and no other choice has one"),
        (GOOD.replace("greedy}", "knapsack}"), "need a score, and no other choice has one"),
        (
            GOOD.replace("sublayer", "width").replace("greedy}", "evolve, generations: 2, offspring: 2, patience: 1}"),
            "need a score",
        ),
        (
            GOOD.replace("sublayer", "expert").replace("greedy}", "evolve, generations: 2, offspring: 2, patience: 1}")
            + "score: {word: routing-frequency}\n",
            "evolve inside sublayers begins at equal shares: unit must be neuron, group or width",
        ),
        (GOOD.replace("objective: kl\n", ""), "a greedy, evolve or learned choice needs an objective"),
        (GOOD.replace("greedy}", "bandit, rounds: 4}"), "choice bandit learns from the loss alone"),
        (GOOD.replace("kl", "loss").replace("greedy}", "gates, steps: 1}"), "choice.gates.steps: Input should be"),
        (GOOD.replace("objective: kl\n", "").replace("greedy}", "sampled-masks, steps: 9}"), "needs an objective"),
        (GOOD.replace("kl", "joy"), "objective: Input should be 'kl', 'loss', 'stream', "),
        (GOOD.replace("sublayer", "pixel"), "unit: Input should be"),
        (GOOD.replace("objective: kl", "").replace("greedy", "span"), "a span consists of whole blocks"),
        (GOOD.replace("name: mine", "name: My Recipe"), "name: String should match"),
        (
            GOOD + "heal: hope\n",
            "heal: Input should be 'none', 'closed-form', ",
        ),
        (GOOD + "heal: bridge\n", "a bridge adds to what a cut leaves, and is no heal of a recipe"),
        (GOOD + "act: quantise\n", "act: Input should be 'drop'"),
        (GOOD + "paper: {citation: Me, link: 'file:///etc/passwd'}\n", "paper.link: String should match"),
        ("- a\n- b\n", "the top level: should be words with values, such as unit: block"),
        ("", "the top level: should be words with values, such as unit: block"),
        (GOOD.replace("greedy}", "greedy, per: unit, refine: 1}"), "refine goes with per budget"),
        (GOOD.replace("greedy}", "greedy, refine: .inf}"), "choice.greedy.refine: Input should be a finite number"),
        (
            GOOD.replace("kl", "loss").replace("greedy}", "bandit, rounds: 4, rate: .inf}"),
            "choice.bandit.rate: Input should be a finite number",
        ),
        (
            GOOD.replace("objective: kl", "act: scale").replace("greedy}", "graded, first: 0, last: .inf}"),
            "choice.graded.last: Input should be a finite number",
        ),
        (
            GOOD.replace("objective: kl", "score: {word: angular}").replace("greedy}", "one-shot}"),
            "score angular is one of whole blocks: unit must be block, not sublayer",
        ),
        (EVOLVE.format("{share: 0.5, survivors: 4}, {share: 0.2, survivors: 2}"), "takes a larger share than the one"),
        (EVOLVE.format("{share: 0.2, survivors: 2}, {share: 0.2, survivors: 2}"), "takes a larger share than the one"),
        (EVOLVE.format("{share: 0.2, survivors: 2}, {share: 0.5, survivors: 4}"), "lets no more survive than came"),
        (EVOLVE.format("{share: 0.2, survivors: 9}"), "lets no more survive than came"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_bad_recipe_gets_one_line_that_names_the_place(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load(file)
    assert str(caught.value).startswith(f"recipe {file} ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("{word: magic}", "there is no score 'magic'"),
        ("{word: block-influence, parameters: {of: kl}}", "score block-influence has no parameter of"),
        ("{word: update-norm, parameters: {relative_to: it}}", "parameter relative_to of score update-norm"),
    ],
)
def test_words_and_parameters_of_scores_are_checked_on_loading(score: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(f"name: mine\ntitle: Mine\nunit: block\nscore: {score}\nchoice: {{word: one-shot}}\n")
    with pytest.raises(InputError) as caught:
        load(file)
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "binary.yaml")
