"""Habits of the source as a whole: nothing is patched, nothing private of other libraries is leant on unseen."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import billhook

SOURCE = Path(billhook.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

#: Arguments and forms that transformers has given up or keeps to itself.
GONE = (
    "cache_position",
    "to_legacy_cache",
    "from_legacy_cache",
    "key_cache",
    "value_cache",
    "_update_causal_mask",
    "_attn_implementation",
    "_attn",
    "_prepare_4d_causal_attention_mask",
)

#: What is private in torch and transformers and used all the same, and the one place where it is.
PRIVATE = {
    ("_modules", "anatomy/undo.py"),
    ("_forward_hooks", "anatomy/undo.py"),
    ("_keys_to_ignore_on_load_missing", "surgery/names.py"),
    ("_keys_to_ignore_on_load_unexpected", "surgery/names.py"),
    ("_out_indices", "anatomy/config.py"),
    ("_model_mapping", "export/remote.py"),
    ("_BaseAutoModelClass", "export/remote.py"),
    ("_apply_gate", "anatomy/mixtures.py"),
}


def words(path: Path) -> Iterator[str]:
    """Every name, attribute, keyword and short text in a file, imported names included; no comments, no docstrings."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.alias(name=word) | ast.arg(arg=word):
                yield word
            case ast.keyword(arg=str(word)):
                yield word
            case ast.Constant(value=str(word)) if re.fullmatch(r"\w+", word):
                yield word


@pytest.mark.parametrize("word", GONE)
def test_nothing_that_transformers_gave_up(word: str) -> None:
    assert not [str(path) for path in FILES if word in words(path)]


def test_a_cache_is_handed_on_and_never_taken_apart() -> None:
    """Neither by number nor by pairs of keys and values."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = [node.value] if isinstance(node, ast.Subscript) else []
            parts += [node.iter] if isinstance(node, (ast.For, ast.comprehension)) else []
            names = {getattr(part, "attr", getattr(part, "id", "")) for part in parts}
            assert not names & {"past_key_values", "past_key_value", "cache"}, f"{path}: {ast.unparse(node)}"


IMPORTING = """
import importlib, pkgutil, sys
import torch, transformers
from transformers.models.llama import modeling_llama

def seen():
    modules = (torch, torch.nn, torch.nn.functional, torch.cuda, transformers.modeling_utils, modeling_llama)
    classes = [c for m in modules for c in vars(m).values() if isinstance(c, type)]
    return {(o.__name__, k): id(v) for o in (*modules, *classes) for k, v in list(vars(o).items()) if callable(v)}

seen()  # what is loaded when it is first looked at is loaded now
before = seen()
import billhook
for module in pkgutil.walk_packages(billhook.__path__, "billhook."):
    importlib.import_module(module.name)
after = seen()
changed = sorted(str(key) for key, value in before.items() if after.get(key) != value)
sys.exit(f"patched: {changed}" if changed else 0)
"""


def test_importing_patches_nothing() -> None:
    subprocess.run([sys.executable, "-c", IMPORTING], check=True)


def reached_into(path: Path) -> Iterator[str]:
    """Private names of things other than the object itself: attributes, by name too, and imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(attr=word) | ast.alias(name=word):
                yield word
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(word)), *_]):
                yield word
            case ast.Subscript(slice=ast.Constant(value=str(word))):
                yield word


def test_what_is_private_elsewhere_is_used_in_one_place() -> None:
    used = {(word, path.relative_to(SOURCE).as_posix()) for path in FILES for word in reached_into(path)}
    defined = {
        n.name
        for path in FILES
        for n in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(n, (ast.FunctionDef, ast.ClassDef))
    }
    assert {(word, place) for word, place in used if re.match(r"_[a-zA-Z]", word) and word not in defined} == PRIVATE
