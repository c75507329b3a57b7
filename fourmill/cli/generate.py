"""`fourmill generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from fourmill.cli.options import parse_names


def generate(
    checkpoint: Annotated[str, typer.Option("--checkpoint", "-c", help="A trained 4M: folder, s3:// URI or hub id.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder or s3:// URI for the files.")],
    given: Annotated[
        list[str] | None,
        typer.Option("--from", "-f", help='What is given: rgb=photo.jpg, caption="…", depth=d.npy; may be repeated.'),
    ] = None,
    to: Annotated[str | None, typer.Option("--to", "-t", help="What to generate, in this order: depth,det,…")] = None,
    plan: Annotated[str | None, typer.Option(help="YAML with a list of targets and their settings.")] = None,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(help="Where a tokenizer lies: depth=PATH, text=PATH for all texts; may be repeated."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Passes to fill a grid.", min=1)] = None,
    order: Annotated[str | None, typer.Option(help="maskgit: confident cells first; roar: random order.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest tokens.", min=0)] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the likeliest k tokens.", min=1)] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest that reach this probability.")] = None,
    guidance: Annotated[
        str | None, typer.Option(help="Classifier-free guidance: 2, or by condition: caption=2,depth=-0.5.")
    ] = None,
    chain: Annotated[
        bool | None,
        typer.Option("--chain/--independent", help="Targets see those generated before; default: unless rgb is given."),
    ] = None,
    count: Annotated[int, typer.Option(help="Variations of each input.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Another seed draws other tokens.")] = 0,
    batch: Annotated[int, typer.Option(help="Samples at once.", min=1)] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto: a GPU if there is one.")] = "auto",
    tokens_only: Annotated[bool, typer.Option("--tokens-only", help="Write tokens, decode nothing.")] = False,
) -> int:
    """Any to any: pictures, maps, boxes and texts from each other with a trained 4M. Writes pictures, values, tokens.

    fourmill generate -c runs/demo/model --from rgb=photo.jpg --to depth,normal,semseg,det,caption,clip -o out

    fourmill generate -c runs/demo/model --from caption="a red cube" --to clip,rgb --count 4 --seed 1 -o out

    fourmill generate -c EPFL-VILAB/4M-7_B_CC12M --from rgb=photo.jpg --to depth,det --tokenizer text=vocab.json -o out
    """
    from fourmill.model.generate.command.run import Options, run_generate

    options = Options(
        steps=steps,
        order=order,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance=_weights(guidance),
        plan=plan,
        chain=chain,
        tokens_only=tokens_only,
        count=count,
        seed=seed,
        batch=batch,
        device=device,
    )
    return run_generate(checkpoint, given or [], parse_names(to) or (), out, tokenizer or [], options)


def _weights(text: str | None) -> float | dict[str, float] | None:
    """'2' as a number, 'caption=2,depth=-0.5' as weights by condition."""
    if text is None:
        return None
    try:
        if "=" not in text:
            return float(text)
        pairs = [part.partition("=") for part in text.split(",")]
        return {name.strip(): float(weight) for name, _, weight in pairs}
    except ValueError:
        raise ValueError(f"--guidance {text!r}: give a number, or weights such as caption=2,depth=-0.5") from None
