"""``billhook generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from billhook.cli import options
from billhook.cli.output import print_json, printable


def generate(
    folder: options.Folder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False, help="What to answer or continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to generate.")] = 100,
    policy: options.Policy = None,
    as_json: options.Json = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = options.DtypeName.AUTO,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Let the model in DIR answer PROMPT, or continue it where it knows no chat.

    Always the likeliest next token, so the same command prints the same text: --seed changes nothing here.

    [dim]Example:[/] billhook generate out/demo "Why is the sky blue?"
    """
    from billhook.recipes.generate import generate as walk

    answer = walk(
        folder,
        prompt,
        max_new_tokens=max_new_tokens,
        policy=policy,
        dtype=dtype.chosen,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        content = {
            "text": answer.text,
            "model": folder,
            "prompt": prompt,
            "seed": seed,
            "max_new_tokens": max_new_tokens,
        }
        print_json(content | ({"drafting": answer.drafting.model_dump()} if answer.drafting else {}))
        return
    typer.echo(printable(answer.text))
    if answer.drafting is not None:
        typer.echo(f"self-speculation: {answer.drafting}", err=True)
