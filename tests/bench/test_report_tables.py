"""A report from a GPU as Markdown."""

from glm_jax.bench.report_tables import bench_report_markdown
from glm_jax.bench.run import bench_report_name
from glm_jax.bench.timing import decode_metrics, summarize

GPU_REPORT = {
    "kind": "decode", "model": "synthetic:flash", "dtype": "bfloat16", "cache_dtype": "bfloat16", "quantize": "int4",
    "kernels": True, "peers": ["reference"], "repeats": 3, "tokens": 64, "cache_holds": "random rows",
    "machine": {
        "device": "NVIDIA H200", "cpu": "a cpu", "cores": 16, "load_average": 0.5, "python": "3.12.3",
        "versions": {"jax": "0.11.2"}, "commit": None,
        "bandwidth": {"bytes_per_s": 4e12, "of": "copies, read and written"},
        "gpu": {
            "driver_version": "580", "clocks.sm": "1 MHz", "clocks.max.sm": "2 MHz", "clocks.mem": "3 MHz",
            "ecc.mode.current": "Enabled", "power.limit": "700 W",
        },
    },
    "loaded": {"glm_jax": {"seconds": 1.0, "weight_bytes": 17e9, "peak_bytes": None}},
    "results": [
        {
            "batch": 8, "context": 8192,
            "glm_jax": {**decode_metrics([0.064], 8, 64), "compile_s": 4.0},
            "reference": {**decode_metrics([0.128], 8, 64), "compile_s": 5.0},
            "ratio": {"reference": summarize([2.0])}, "same_tokens": {"reference": 0.5},
            "read": {
                "bytes_per_step": 4e9, "bytes_per_s": 4e12, "of_measured_bandwidth": 1.0, "of_bound": 0.5,
            },
            "compiled": {"launches_per_token": 390},
            "profiled": {"us": 1000.0, "operations": [{"name": "down_kernel", "count": 46.0, "us": 500.0}]},
        }
    ],
}  # fmt: skip


def test_report_of_a_gpu():
    text = bench_report_markdown(GPU_REPORT)
    row = next(line for line in text.splitlines() if line.startswith("| 8 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    one = "1.000 (1.000 – 1.000)"
    assert cells == [
        "8", "8k", one, "1,000.0", "8,000.0 (8,000.0 – 8,000.0)", "~4.000", "~4,000.0", "~100%", "~50%", "390",
        "2.000 (2.000 – 2.000)", "**2.00 (2.00 – 2.00)**", "50%", "4.0",
    ]  # fmt: skip
    assert "driver 580, clocks 1 MHz of 2 MHz and memory 3 MHz, ECC Enabled" in text
    assert "| down_kernel | 46.0 | 500.0 | 50% |" in text
    assert "commit unknown" in text
    assert "as many active experts as uniform routing would choose" in text
    assert bench_report_name(GPU_REPORT) == "nvidia-h200-decode-synthetic-flash-int4"
