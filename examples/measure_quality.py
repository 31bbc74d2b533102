"""Measures the quality of every quantization of the built-in miniature, for the tables of docs/quantization.md.

.venv/bin/python -m examples.measure_quality                      # everything
.venv/bin/python -m examples.measure_quality --models int4/rtn int4/mse --chat none int4/mse --out measured

The text is the held-out files of the Python standard library; the chat tasks are those of
``held_out_tasks.large_evaluation_conversations``. Neither is used in training or calibration. Weights have their stored
values; activations are float32.
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


Candidate = tuple[ComparedModel, dict[str, Any], str]
"""A model to compare with the reference, the beginning of its record, and its cache dtype."""


@dataclasses.dataclass(slots=True)
class MeasuredModel:
    """A quantized model and its measurements.

    Attributes:
        name: "preset/method", or :data:`UNQUANTIZED`.
        record: Measurements by name, as written to results.json.
        compared_model: The loaded model.
    """

    name: str
    record: dict[str, Any]
    compared_model: ComparedModel


def main() -> None:
    """Measures all models and writes results.json, the plot and the tables."""
    args = _parse_arguments()
    enable_compile_cache()
    started = time.perf_counter()
    source = open_source("tiny")
    assets = ModelAssets.load(source.cfg, source.info.folder)
    reference = load_compared_model(source, assets, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        models = [_quantize_model(name, source, assets, Path(folder)) for name in args.models]
        models.insert(0, MeasuredModel(UNQUANTIZED, {"name": UNQUANTIZED, "size": model_sizes(source)}, reference))
        results, positions = _measure_text(reference, models, assets, args)
        if args.chat:
            _measure_chat(reference, [model for model in models if model.name in args.chat], assets, results)
    results["differences"] = _method_differences(positions)
    results["seconds"] = round(time.perf_counter() - started, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _plot(results, args.out / "quality.png")
    if args.page:
        fill_page(args.page, markdown_tables(results))
    print(*markdown_tables(results).values(), sep="\n\n")
    print(f"\n{results['seconds']:.0f} s in total", file=sys.stderr)


def _quantize_model(name: str, source: WeightSource, assets: ModelAssets, folder: Path) -> MeasuredModel:
    """Quantizes the model as ``name`` ("preset/method") says, and measures its size and weight errors."""
    started = time.perf_counter()
    preset, _, method = name.partition("/")
    if method == "signround":
        report = convert_checkpoint(
            source, folder / name.replace("/", "-"), quantize=preset, method="signround", progress=True
        )
        quantized = open_source(report.folder)
    else:
        quantized = quantize_by_preset(source, preset, "rtn" if method == "rtn" else "mse")
    compared_model = load_compared_model(quantized, assets, dtype="float32")
    seconds = time.perf_counter() - started
    errors = weight_errors(source, quantized)
    record = {
        "name": name,
        "size": model_sizes(quantized),
        "weights": errors["by_kind"],
        "seconds_to_make": round(seconds, 1),
    }
    return MeasuredModel(name, record, compared_model)


def _measure_text(
    reference: ComparedModel, models: Sequence[MeasuredModel], assets: ModelAssets, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, PositionMetrics]]:
    """Measures divergences with a float32 cache, and on part of the text with every cache dtype."""
    _, files = corpus.split_held_out(corpus.library_files())
    ids = [assets.tokenizer.encode(file.text) for file in files]
    by_weights: dict[str, Candidate] = {}
    by_weights |= {model.name: (model.compared_model, model.record, "float32") for model in models[1:]}
    by_cache: dict[str, Candidate] = {}
    for model in (model for model in models if model.name in args.cached):
        for cache_dtype in ("float32", *args.caches):
            compared_model = dataclasses.replace(model.compared_model, cache_dtype=cache_dtype)
            record = {"name": model.name, "cache_bytes_per_token": bytes_per_token(reference.cfg, cache_dtype)}
            by_cache[f"{model.name} {cache_dtype}"] = (compared_model, record, cache_dtype)
    started = time.perf_counter()
    rows, positions = _measure_divergence(reference, by_weights, ids, args.tokens)
    cache_rows, _ = _measure_divergence(reference, by_cache, ids, args.cached_tokens)
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
    reference: ComparedModel, candidates: dict[str, Candidate], ids: list[list[int]], max_tokens: int
) -> tuple[list[dict[str, Any]], dict[str, PositionMetrics]]:
    """Results by row, and the metrics of every position by name of the candidate."""
    if not candidates:
        return [], {}
    models = [model for model, _, _ in candidates.values()]
    metrics = divergence.measure_divergence(reference, models, ids, max_tokens=max_tokens, progress=True)
    rows = [
        {**record, "cache": cache_dtype, "text": positions.summary()}
        for (_, record, cache_dtype), positions in zip(candidates.values(), metrics, strict=True)
    ]
    return rows, dict(zip(candidates, metrics, strict=True))


def _measure_chat(
    reference: ComparedModel, models: Sequence[MeasuredModel], assets: ModelAssets, results: dict[str, Any]
) -> None:
    tasks = [held_out_tasks.to_record(item) for item in held_out_tasks.large_evaluation_conversations()]
    prompts = chat_tasks.render_prompts(tasks, assets)
    started = time.perf_counter()
    reference_scores = chat_tasks.answer_tasks(reference, tasks, prompts, progress=True)
    results["chat"] = {}
    for model in models:
        scores = (
            reference_scores
            if model.compared_model is reference
            else chat_tasks.answer_tasks(model.compared_model, tasks, prompts, progress=True)
        )
        results["chat"][model.name] = chat_tasks.summarize_comparison(reference_scores, scores)
    results["seconds_on_chat"] = round(time.perf_counter() - started, 1)


def _method_differences(positions: dict[str, PositionMetrics]) -> dict[str, Any]:
    """Differences in mean KL, with confidence intervals, between each two methods of a preset."""
    differences = {}
    for name, other in itertools.combinations((name for name in positions if " " not in name), 2):
        if name.partition("/")[0] == other.partition("/")[0]:
            difference, *ends = paired_bootstrap(positions[other].kl, positions[name].kl)
            differences[f"{other} - {name}"] = {"kl": difference, "kl_95": ends}
    return differences


def markdown_tables(results: dict[str, Any]) -> dict[str, str]:
    """Renders the Markdown tables of the page, by the name in their markers."""
    tables = {"weights": _weights_table(results), "cache": _cache_table(results)}
    if results["differences"]:
        tables["methods"] = _methods_table(results)
    return {**tables, "chat": _chat_table(results["chat"])} if "chat" in results else tables


def _weights_table(results: dict[str, Any]) -> str:
    head = ["preset / method", "bits per weight", "of bfloat16's bytes", "error of experts", "mean KL (95 %)"]
    rows = [[*head, "99 % of KL", "perplexity", "same token", "where the lead > 0.5"]]
    before = results["source"]["main"]["bytes"]
    for row in results["rows"]:
        if "weights" in row:
            size, text = row["size"], row["text"]
            cells = [f"{size['bits_per_weight']:.2f}", f"{size['main']['bytes'] / before:.1%}"]
            rows.append(
                [row["name"], *cells, format_relative_error(row["weights"]["experts"]), *_divergence_cells(text)]
            )
    text = results["rows"][0]["text"]
    perplexity = f"{text['perplexity']['reference']:.3f}"
    rows.insert(1, ["bfloat16, as trained", "16.00", "100.0%", "0", "0", "0", perplexity, "100%", "100%"])
    rows[1][1] = f"{results['source']['bits_per_weight']:.2f}"
    words = f"{text['tokens']:,} tokens of {results['files']} files; the lead is over 0.5 nats at "
    return f"{labeled_table(rows[0], rows[1:])}\n\n{words}{text['top1']['sure_positions']:,} of them."


def _cache_table(results: dict[str, Any]) -> str:
    """A row for each model that was measured with several cache dtypes, a column for each dtype."""
    by_model = {(row["name"], row["cache"]): row for row in results["cached"]}
    caches = [*dict.fromkeys(cache for _, cache in by_model)]
    widths = {row["cache"]: f"{row['cache_bytes_per_token']:,} bytes" for row in results["cached"]}
    rows = [["weights", *caches], ["of a token", *(widths[cache] for cache in caches)]]
    for name in dict.fromkeys(name for name, _ in by_model):
        cells = [_short_cell(by_model[name, cache]["text"]) for cache in caches]
        rows.append(["bfloat16" if name == UNQUANTIZED else name, *cells])
    tokens = results["cached"][0]["text"]["tokens"] if rows[2:] else 0
    return f"{labeled_table(rows[0], rows[1:])}\n\n{tokens:,} tokens, in windows spread evenly over the same text."


def _short_cell(text: dict[str, Any]) -> str:
    return f"{format_nats(text['kl']['mean'])} / {text['top1']['agreement']:.2%}"


def _divergence_cells(text: dict[str, Any]) -> list[str]:
    kl, top = text["kl"], text["top1"]
    low, high = kl["mean_95"]
    shares = [f"{top[name]:.2%}" for name in ("agreement", "sure_agreement")]
    mean = f"{format_nats(kl['mean'])} ({format_nats(low)} – {format_nats(high)})"
    return [mean, format_nats(kl["p99"]), f"{text['perplexity']['model']:.3f}", *shares]


def _methods_table(results: dict[str, Any]) -> str:
    rows = [["difference", "mean KL in nats", "95 % interval"]]
    for name, difference in results["differences"].items():
        low, high = difference["kl_95"]
        rows.append([name.replace(" - ", " − "), f"{difference['kl']:+.3g}", f"{low:+.3g} to {high:+.3g}"])
    return labeled_table(rows[0], rows[1:])


def _chat_table(comparisons: dict[str, Any]) -> str:
    rows = [["weights", "tasks", "right", "tool calls right", "difference (95 %)", "ratio (95 %)"]]
    for name, comparison in comparisons.items():
        model, (low, high) = comparison["model"], comparison["difference_95"]
        calls = f"{model['by_kind']['tool_call']:.1%}"
        cells = [f"{model['tasks']:,}", f"{model['exact_match']:.2%}", calls]
        if name == UNQUANTIZED:
            rows.append(["bfloat16", *cells, "", ""])
            continue
        ratio, ends = comparison["ratio"], comparison["ratio_95"]
        difference = f"{comparison['difference']:+.2%} ({low:+.2%} to {high:+.2%})"
        rows.append([name, *cells, difference, f"{ratio:.4f} ({ends[0]:.4f} – {ends[1]:.4f})"])
    return labeled_table(rows[0], rows[1:])


def fill_page(page: Path, tables: dict[str, str]) -> None:
    """Replaces the text between the markers of each table on the page.

    Raises:
        SystemExit: if the page lacks a marker.
    """
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, has_begin, rest = text.partition(begin)
        _, has_end, after = rest.partition(end)
        if not (has_begin and has_end):
            raise SystemExit(f"{page} has no markers for {name}: {begin} … {end}")
        text = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def _plot(results: dict[str, Any], path: Path) -> None:
    """Plots divergence over bits per weight, a series for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # only this plot needs matplotlib
    from matplotlib.figure import Figure  # only this plot needs matplotlib

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in results["rows"] if "weights" in row]
    for method, marker in zip(METHODS, "osD", strict=True):
        series = sorted((row for row in rows if row["name"].endswith(f"/{method}")), key=_bits_per_weight)
        kl = [row["text"]["kl"]["mean"] for row in series]
        axes.plot([_bits_per_weight(row) for row in series], kl, marker, label=method)
    for preset in {row["name"].partition("/")[0] for row in rows}:
        same_preset = [row for row in rows if row["name"].partition("/")[0] == preset]
        top = max(row["text"]["kl"]["mean"] for row in same_preset)
        axes.annotate(preset, (_bits_per_weight(same_preset[0]), top), (0, 8), textcoords="offset points", ha="center")
    axes.set(xlabel="bits per weight", ylabel="mean KL in nats", yscale="log")
    axes.margins(0.1, 0.15)
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(path)


def _bits_per_weight(row: dict[str, Any]) -> float:
    return row["size"]["bits_per_weight"]


def _parse_arguments() -> argparse.Namespace:
    all_models = [f"{preset}/{method}" for preset in QUANT_PRESETS for method in METHODS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=all_models, default=all_models, metavar="PRESET/METHOD", help="default: all")
    add(
        "--cached",
        nargs="*",
        choices=[UNQUANTIZED, *all_models],
        default=[UNQUANTIZED, *all_models],
        help="models to measure with --caches too",
    )
    add("--caches", nargs="*", choices=CACHES, default=CACHES, help="dtypes of the latent cache")
    add(
        "--chat",
        nargs="*",
        choices=[UNQUANTIZED, *all_models],
        default=CHAT_MODELS,
        help="models to give the chat tasks",
    )
    add("--tokens", type=int, default=TEXT_TOKENS, help="approximate number of held-out tokens")
    add("--cached-tokens", type=int, default=TEXT_TOKENS // 5, help="the same for other caches")
    add("--out", type=Path, default=ROOT / "docs" / "quantization", help="folder of results.json and quality.png")
    add("--page", type=Path, help="page whose tables to fill in, such as docs/quantization.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
