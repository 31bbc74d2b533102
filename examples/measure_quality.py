"""Measures every way to quantize the built-in miniature, and fills the tables and the picture of docs/quantization.md.

.venv/bin/python -m examples.measure_quality                      # everything
.venv/bin/python -m examples.measure_quality --models int4/rtn int4/mse --chat none int4/mse --out measured

Text: the held-out files of the Python standard library. Chat: the tasks of ``held_out_tasks.more_conversations``. Neither has
a part in training or calibration. Weights have the values that are stored, activations are float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from convert.pipeline import convert_checkpoint  # noqa: E402
from convert.quality import chat_tasks, divergence  # noqa: E402
from convert.quality.models import ComparedModel, load_compared_model, quantize_by_preset  # noqa: E402
from convert.quality.position_metrics import PositionMetrics  # noqa: E402
from convert.quality.report_tables import format_nats, format_relative_error, labeled_table  # noqa: E402
from convert.quality.statistics import paired_bootstrap  # noqa: E402
from convert.quality.weight_errors import model_sizes, weight_errors  # noqa: E402
from examples.tiny_recipe import corpus, held_out_tasks  # noqa: E402
from glm_jax.cache.latent import bytes_per_token  # noqa: E402
from glm_jax.checkpoint.sources.base import WeightSource  # noqa: E402
from glm_jax.checkpoint.sources.open import open_source  # noqa: E402
from glm_jax.engine.assets import ModelAssets  # noqa: E402
from glm_jax.engine.compile_cache import enable_compile_cache  # noqa: E402
from glm_jax.weights import QUANT_PRESETS  # noqa: E402

METHODS = ("rtn", "mse", "signround")
CACHES = ("bfloat16", "int8", "fp8")
UNQUANTIZED = "none"
CHAT_MODELS = (UNQUANTIZED, *(f"int4/{method}" for method in METHODS), "int4-small/mse", "int8/mse")
TEXT_TOKENS = 112_000
BEGIN, END = "<!-- {}: written by examples/measure_quality.py -->", "<!-- end of {} -->"


@dataclasses.dataclass(slots=True)
class MeasuredModel:
    """One way to store the weights: its figures, and the model itself."""

    name: str
    figures: dict[str, Any]
    compared_model: ComparedModel


def main() -> None:
    """Parses the command line, measures, and writes."""
    args = _arguments()
    enable_compile_cache()
    started = time.perf_counter()
    source = open_source("tiny")
    companions = ModelAssets.load(source.cfg, source.info.folder)
    exact = load_compared_model(source, companions, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        models = [_make_model(name, source, companions, Path(folder)) for name in args.models]
        models.insert(0, MeasuredModel(UNQUANTIZED, {"name": UNQUANTIZED, "size": model_sizes(source)}, exact))
        results, positions = _measure_text(exact, models, companions, args)
        if args.chat:
            _measure_chat(exact, [model for model in models if model.name in args.chat], companions, results)
    results["differences"] = _differences(positions)
    results["seconds"] = round(time.perf_counter() - started, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _plot(results, args.out / "quality.png")
    if args.page:
        fill_page(args.page, markdown_tables(results))
    print(*markdown_tables(results).values(), sep="\n\n")
    print(f"\n{results['seconds']:.0f} s in all", file=sys.stderr)


def _make_model(name: str, source: WeightSource, companions: ModelAssets, folder: Path) -> MeasuredModel:
    """A model by ``preset/method``."""
    started = time.perf_counter()
    preset, _, method = name.partition("/")
    if method == "signround":
        report = convert_checkpoint(
            source, folder / name.replace("/", "-"), quantize=preset, method="signround", progress=True
        )
        made = open_source(report.folder)
    else:
        made = quantize_by_preset(source, preset, "rtn" if method == "rtn" else "mse")
    side = load_compared_model(made, companions, dtype="float32")
    seconds = time.perf_counter() - started
    errors = weight_errors(source, made)
    figures = {
        "name": name,
        "size": model_sizes(made),
        "weights": errors["by_kind"],
        "seconds_to_make": round(seconds, 1),
    }
    return MeasuredModel(name, figures, side)


def _measure_text(
    exact: ComparedModel, models: Sequence[MeasuredModel], companions: ModelAssets, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, PositionMetrics]]:
    """Divergences with a float32 cache, and on a part of the text with every cache."""
    _, files = corpus.split_held_out(corpus.library_files())
    ids = [companions.tokenizer.encode(file.text) for file in files]
    wanted: dict[str, tuple[ComparedModel, dict[str, Any], str]] = {}
    wanted |= {model.name: (model.compared_model, model.figures, "float32") for model in models[1:]}
    cached: dict[str, tuple[ComparedModel, dict[str, Any], str]] = {}
    for model in (model for model in models if model.name in args.cached):
        for kind in ("float32", *args.caches):
            side = dataclasses.replace(model.compared_model, cache_dtype=kind)
            figures = {"name": model.name, "cache_bytes_per_token": bytes_per_token(exact.cfg, kind)}
            cached[f"{model.name} {kind}"] = (side, figures, kind)
    started = time.perf_counter()
    rows, positions = _measure_divergence(exact, wanted, ids, args.tokens)
    cache_rows, _ = _measure_divergence(exact, cached, ids, args.cached_tokens)
    seconds = time.perf_counter() - started
    results = {
        "model": "tiny",
        "files": len(files),
        "tokens_in_files": sum(map(len, ids)),
        "source": model_sizes(open_source("tiny")),
        "rows": rows,
        "cached": cache_rows,
        "seconds_on_text": round(seconds, 1),
    }
    return results, positions


def _measure_divergence(
    exact: ComparedModel,
    wanted: dict[str, tuple[ComparedModel, dict[str, Any], str]],
    ids: list[list[int]],
    tokens: int,
) -> tuple[list[dict[str, Any]], dict[str, PositionMetrics]]:
    if not wanted:
        return [], {}
    found = divergence.measure_divergence(
        exact, [side for side, _, _ in wanted.values()], ids, max_tokens=tokens, progress=True
    )
    rows = [
        {**figures, "cache": kind, "text": positions.summary()}
        for (_, figures, kind), positions in zip(wanted.values(), found, strict=True)
    ]
    return rows, dict(zip(wanted, found, strict=True))


def _measure_chat(
    exact: ComparedModel, models: Sequence[MeasuredModel], companions: ModelAssets, results: dict[str, Any]
) -> None:
    tasks = [held_out_tasks.to_record(item) for item in held_out_tasks.large_evaluation_conversations()]
    prompts = chat_tasks.render_prompts(tasks, companions)
    started = time.perf_counter()
    ours = chat_tasks.answer_tasks(exact, tasks, prompts, progress=True)
    results["chat"] = {}
    for model in models:
        theirs = (
            ours
            if model.compared_model is exact
            else chat_tasks.answer_tasks(model.compared_model, tasks, prompts, progress=True)
        )
        results["chat"][model.name] = chat_tasks.summarize_comparison(ours, theirs)
    results["seconds_on_chat"] = round(time.perf_counter() - started, 1)


def _differences(positions: dict[str, PositionMetrics]) -> dict[str, Any]:
    """Of each two methods of a preset: mean KL of the later one minus that of the earlier, with its interval."""
    found = {}
    for name, other in itertools.combinations((name for name in positions if " " not in name), 2):
        if name.partition("/")[0] == other.partition("/")[0]:
            difference, *ends = paired_bootstrap(positions[other].kl, positions[name].kl)
            found[f"{other} - {name}"] = {"kl": difference, "kl_95": ends}
    return found


def markdown_tables(results: dict[str, Any]) -> dict[str, str]:
    """The Markdown tables of the page, by the name of their place in it."""
    made = {"weights": _weights_table(results), "cache": _cache_table(results)}
    if results["differences"]:
        made["methods"] = _methods_table(results)
    return {**made, "chat": _chat_table(results["chat"])} if "chat" in results else made


def _weights_table(results: dict[str, Any]) -> str:
    head = ["preset / method", "bits per weight", "of bfloat16's bytes", "error of experts", "mean KL (95 %)"]
    rows = [[*head, "99 % of KL", "perplexity", "same token", "where the lead > 0.5"]]
    before = results["source"]["main"]["bytes"]
    for row in results["rows"]:
        if "weights" in row:
            size, text = row["size"], row["text"]
            cells = [f"{size['bits_per_weight']:.2f}", f"{size['main']['bytes'] / before:.1%}"]
            rows.append([row["name"], *cells, format_relative_error(row["weights"]["experts"]), *_figure_cells(text)])
    text = results["rows"][0]["text"]
    perplexity = f"{text['perplexity']['reference']:.3f}"
    rows.insert(1, ["bfloat16, as trained", "16.00", "100.0%", "0", "0", "0", perplexity, "100%", "100%"])
    rows[1][1] = f"{results['source']['bits_per_weight']:.2f}"
    words = f"{text['tokens']:,} tokens of {results['files']} files; the lead is over 0.5 nats at "
    return f"{labeled_table(rows[0], rows[1:])}\n\n{words}{text['top1']['sure_positions']:,} of them."


def _cache_table(results: dict[str, Any]) -> str:
    """A row for each model that was measured with several caches, a column for each cache."""
    found = {(row["name"], row["cache"]): row for row in results["cached"]}
    caches = [*dict.fromkeys(cache for _, cache in found)]
    widths = {row["cache"]: f"{row['cache_bytes_per_token']:,} bytes" for row in results["cached"]}
    rows = [["weights", *caches], ["of a token", *(widths[cache] for cache in caches)]]
    for name in dict.fromkeys(name for name, _ in found):
        cells = [_short_cell(found[name, cache]["text"]) for cache in caches]
        rows.append(["bfloat16" if name == UNQUANTIZED else name, *cells])
    tokens = results["cached"][0]["text"]["tokens"] if rows[2:] else 0
    return f"{labeled_table(rows[0], rows[1:])}\n\n{tokens:,} tokens, in windows spread evenly over the same text."


def _short_cell(text: dict[str, Any]) -> str:
    return f"{format_nats(text['kl']['mean'])} / {text['top1']['agreement']:.2%}"


def _figure_cells(text: dict[str, Any]) -> list[str]:
    kl, top = text["kl"], text["top1"]
    low, high = kl["mean_95"]
    shares = [f"{top[name]:.2%}" for name in ("agreement", "sure_agreement")]
    mean = f"{format_nats(kl['mean'])} ({format_nats(low)} – {format_nats(high)})"
    return [mean, format_nats(kl["p99"]), f"{text['perplexity']['model']:.3f}", *shares]


def _methods_table(results: dict[str, Any]) -> str:
    rows = [["difference", "mean KL in nats", "95 % interval"]]
    for name, found in results["differences"].items():
        low, high = found["kl_95"]
        rows.append([name.replace(" - ", " − "), f"{found['kl']:+.3g}", f"{low:+.3g} to {high:+.3g}"])
    return labeled_table(rows[0], rows[1:])


def _chat_table(answered: dict[str, Any]) -> str:
    rows = [["weights", "tasks", "right", "tool calls right", "difference (95 %)", "ratio (95 %)"]]
    for name, found in answered.items():
        model, (low, high) = found["model"], found["difference_95"]
        calls = f"{model['by_kind']['tool_call']:.1%}"
        cells = [f"{model['tasks']:,}", f"{model['exact_match']:.2%}", calls]
        if name == UNQUANTIZED:
            rows.append(["bfloat16", *cells, "", ""])
            continue
        ratio, ends = found["ratio"], found["ratio_95"]
        difference = f"{found['difference']:+.2%} ({low:+.2%} to {high:+.2%})"
        rows.append([name, *cells, difference, f"{ratio:.4f} ({ends[0]:.4f} – {ends[1]:.4f})"])
    return labeled_table(rows[0], rows[1:])


def fill_page(page: Path, made: dict[str, str]) -> None:
    """Puts each table between its marks on the page; the marks must be there."""
    text = page.read_text(encoding="utf-8")
    for name, content in made.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{page} has no place for {name}: {begin} … {end}")
        text = f"{before}{begin}\n\n{content}\n\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def _plot(results: dict[str, Any], path: Path) -> None:
    """Bytes against divergence, a line for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in results["rows"] if "weights" in row]
    for method, mark in zip(METHODS, "osD", strict=True):
        mine = sorted((row for row in rows if row["name"].endswith(f"/{method}")), key=_bits_per_weight)
        axes.plot(
            [_bits_per_weight(row) for row in mine], [row["text"]["kl"]["mean"] for row in mine], mark, label=method
        )
    for name in {row["name"].partition("/")[0] for row in rows}:
        mine = [row for row in rows if row["name"].partition("/")[0] == name]
        top = max(row["text"]["kl"]["mean"] for row in mine)
        axes.annotate(name, (_bits_per_weight(mine[0]), top), (0, 8), textcoords="offset points", ha="center")
    axes.set(xlabel="bits per weight", ylabel="mean KL in nats", yscale="log")
    axes.margins(0.1, 0.15)
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(path)


def _bits_per_weight(row: dict[str, Any]) -> float:
    return row["size"]["bits_per_weight"]


def _arguments() -> argparse.Namespace:
    every = [f"{preset}/{method}" for preset in QUANT_PRESETS for method in METHODS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=every, default=every, metavar="PRESET/METHOD", help="all of them unless given")
    add(
        "--cached",
        nargs="*",
        choices=[UNQUANTIZED, *every],
        default=[UNQUANTIZED, *every],
        help="measured with --caches too",
    )
    add("--caches", nargs="*", choices=CACHES, default=CACHES, help="dtypes of the latent cache")
    add(
        "--chat", nargs="*", choices=[UNQUANTIZED, *every], default=CHAT_MODELS, help="which also answer the chat tasks"
    )
    add("--tokens", type=int, default=TEXT_TOKENS, help="held-out tokens to look at, about")
    add("--cached-tokens", type=int, default=TEXT_TOKENS // 5, help="the same for other caches")
    add("--out", type=Path, default=ROOT / "docs" / "quantization", help="folder of results.json and quality.png")
    add("--page", type=Path, help="page whose tables are filled in, docs/quantization.md for the one of the repository")
    return parser.parse_args()


if __name__ == "__main__":
    main()
