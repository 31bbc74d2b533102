"""``manifest.json``: config, arrays and hashes of a converted folder, and nothing that varies from run to run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_jax.checkpoint.array_record import FLOAT_DTYPES, ArrayRecords, records_from_json, records_to_json
from glm_jax.checkpoint.folder.layout import checkpoint_layout, disk_arrays
from glm_jax.checkpoint.messages import format_names, printable
from glm_jax.checkpoint.round_trip import RoundTripInfo
from glm_jax.config import Config
from glm_jax.errors import CheckpointError, ConfigError, QuantError
from glm_jax.weights import QuantSpec

MANIFEST_FORMAT = "glm-jax"
MANIFEST_VERSION = 2  # version 2 introduced quantized weights; folders without them are still written as version 1
MANIFEST_NAME = "manifest.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of a converted folder.

    Attributes:
        cfg: Config of the model.
        dtype: Dtype of most plain arrays.
        original: Facts about the source checkpoint that are needed to write it back unchanged.
        source_fingerprint: Fingerprint of the source and of the options of its conversion.
        array_records: Records of the arrays of each layer checkpoint.
        quant_specs: Quantization of quantized leaves, by ``checkpoint/leaf``.
    """

    cfg: Config
    dtype: str
    original: RoundTripInfo
    source_fingerprint: str
    array_records: Mapping[str, ArrayRecords]
    quant_specs: Mapping[str, QuantSpec] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """Canonical JSON text; equal manifests have equal text."""
        extra = {"latent_eps": self.cfg.latent_eps, "mtp_own_embeddings": self.cfg.mtp_own_embeddings}
        fields = {
            "format": MANIFEST_FORMAT,
            "format_version": MANIFEST_VERSION if self.quant_specs else 1,
            "config": {**self.cfg.to_hf(), **extra},
            "dtype": self.dtype,
            "original": dataclasses.asdict(self.original),
            "source": self.source_fingerprint,
            "parts": {name: records_to_json(records) for name, records in self.array_records.items()},
        }
        if self.quant_specs:
            fields["storage"] = {leaf: spec.to_json() for leaf, spec in self.quant_specs.items()}
        return json.dumps(fields, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> Manifest:
        """Parses and checks a manifest.

        Args:
            text: Content of the file.
            path: Path of the file, for error messages.

        Raises:
            CheckpointError: If the manifest is damaged, has a newer version, or does not list exactly the arrays that
                its config needs.
        """
        try:
            fields = json.loads(text)
            _check_version(fields, path)
            manifest = cls._from_fields(fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError, QuantError) as error:
            raise CheckpointError(f"{path} is damaged ({printable(str(error))}): convert again") from None
        _check_arrays(manifest, path)
        return manifest

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Manifest:
        config = dict(fields["config"])
        extra = {key: config.pop(key) for key in ("latent_eps", "mtp_own_embeddings")}
        return cls(
            cfg=Config.from_hf(config).replace(**extra),
            dtype=FLOAT_DTYPES[fields["dtype"]].name,
            original=_parse_round_trip_info(fields["original"]),
            source_fingerprint=str(fields["source"]),
            array_records={name: records_from_json(records) for name, records in fields["parts"].items()},
            quant_specs={leaf: QuantSpec.from_json(spec) for leaf, spec in fields.get("storage", {}).items()},
        )


def load_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a converted folder.

    Raises:
        CheckpointError: If the file cannot be read or is not valid.
    """
    path = folder / MANIFEST_NAME
    try:
        return Manifest.from_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def is_converted_folder(folder: Path) -> bool:
    """Whether a folder is a converted folder, even with a damaged manifest.

    A ``manifest.json`` alone does not tell, because other programs have files of that name too: the manifest must name
    the format, or the folder must hold layer checkpoints.
    """
    path = folder / MANIFEST_NAME
    if not path.exists() or (folder / "parts").is_dir():
        return path.exists()
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.get("format") == MANIFEST_FORMAT


def _is_allowed_dtype(dtype: str, fixed_dtype: str | None) -> bool:
    return dtype in FLOAT_DTYPES if fixed_dtype is None else dtype == fixed_dtype


def _parse_round_trip_info(fields: dict[str, Any]) -> RoundTripInfo:
    copies = tuple(name for name in ("embed", "head") if name in fields["mtp_copies"])
    dtypes = {str(key): FLOAT_DTYPES[value].name for key, value in fields["dtypes"].items()}
    return RoundTripInfo(copies, fields["head_copy"] is True, dtypes)


def _check_version(fields: Any, path: Path) -> None:
    if not isinstance(fields, dict) or fields.get("format") != MANIFEST_FORMAT:
        raise ValueError(f"it does not say format {MANIFEST_FORMAT!r}")
    version = fields.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"impossible format_version {version!r}")
    if version > MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this program reads up to version {MANIFEST_VERSION}: "
            "update it, or convert the checkpoint again"
        )


def _check_arrays(manifest: Manifest, path: Path) -> None:
    """Compares the listed arrays with the arrays that the config needs."""
    leaves = {
        f"{leaf.checkpoint_name}/{leaf.name}": leaf
        for members in checkpoint_layout(manifest.cfg).values()
        for leaf in members
    }
    needed = {
        f"{array.checkpoint_name}/{array.name}": array
        for key, leaf in leaves.items()
        for array in disk_arrays(leaf, manifest.quant_specs.get(key))
    }
    listed = {
        f"{checkpoint_name}/{name}": record
        for checkpoint_name, records in manifest.array_records.items()
        for name, record in records.items()
    }
    groups = {
        "missing": [key for key in needed if key not in listed],
        "unknown": [printable(key) for key in listed if key not in needed],
        "of the wrong shape": [k for k, a in needed.items() if k in listed and listed[k].shape != a.shape],
        "of the wrong dtype": [
            k for k, a in needed.items() if k in listed and not _is_allowed_dtype(listed[k].dtype, a.dtype)
        ],
        "quantized, but not in the model": [printable(key) for key in manifest.quant_specs if key not in leaves],
    }
    problems = [f"{len(items)} arrays {title}: {format_names(items)}" for title, items in groups.items() if items]
    if problems:
        raise CheckpointError(f"{path} does not fit its own config.\n  " + "\n  ".join(problems))
