"""``manifest.json``: what a converted folder holds, with a hash of every array and nothing that varies between runs."""

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
MANIFEST_VERSION = 2  # the first with quantized weights; a folder without any is still of version 1
MANIFEST_NAME = "manifest.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of a converted folder.

    Attributes:
        cfg: of the model.
        dtype: of most arrays.
        original: what is needed to write the source checkpoint back as it was.
        source_fingerprint: fingerprint of the source and the options it was converted with.
        array_records: the arrays of each part.
        quant_specs: how leaves are quantized, by ``part/leaf``.
    """

    cfg: Config
    dtype: str
    original: RoundTripInfo
    source_fingerprint: str
    array_records: Mapping[str, ArrayRecords]
    quant_specs: Mapping[str, QuantSpec] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """Canonical text: equal manifests are equal bytes."""
        extra = {"latent_eps": self.cfg.latent_eps, "mtp_own_embeddings": self.cfg.mtp_own_embeddings}
        fields = {
            "format": MANIFEST_FORMAT,
            "format_version": MANIFEST_VERSION if self.quant_specs else 1,
            "config": {**self.cfg.to_hf(), **extra},
            "dtype": self.dtype,
            "original": dataclasses.asdict(self.original),
            "source": self.source_fingerprint,
            "parts": {part: records_to_json(records) for part, records in self.array_records.items()},
        }
        if self.quant_specs:
            fields["storage"] = {leaf: spec.to_json() for leaf, spec in self.quant_specs.items()}
        return json.dumps(fields, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: Path) -> Manifest:
        """Reads and checks a manifest.

        Raises:
            CheckpointError: if it is damaged, from a newer version, or does not list what its config needs.
        """
        try:
            fields = json.loads(text)
            _check_version(fields, where)
            manifest = cls._from_fields(fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError, QuantError) as error:
            raise CheckpointError(f"{where} is damaged ({printable(str(error))}): convert again") from None
        _check_arrays(manifest, where)
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
            array_records={part: records_from_json(records) for part, records in fields["parts"].items()},
            quant_specs={leaf: QuantSpec.from_json(spec) for leaf, spec in fields.get("storage", {}).items()},
        )


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a converted folder.

    Raises:
        CheckpointError: if it cannot be read or used.
    """
    path = folder / MANIFEST_NAME
    try:
        return Manifest.from_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def is_converted_folder(folder: Path) -> bool:
    """Whether a folder's manifest.json is one of ours, even a damaged one: it says so, or parts lie beside it.

    Other programs have files of that name too.
    """
    path = folder / MANIFEST_NAME
    if not path.exists() or (folder / "parts").is_dir():
        return path.exists()
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.get("format") == MANIFEST_FORMAT


def _is_allowed_dtype(dtype: str, fixed: str | None) -> bool:
    return dtype in FLOAT_DTYPES if fixed is None else dtype == fixed


def _parse_round_trip_info(fields: dict[str, Any]) -> RoundTripInfo:
    copies = tuple(name for name in ("embed", "head") if name in fields["mtp_copies"])
    dtypes = {str(key): FLOAT_DTYPES[value].name for key, value in fields["dtypes"].items()}
    return RoundTripInfo(copies, fields["head_copy"] is True, dtypes)


def _check_version(fields: Any, where: Path) -> None:
    if not isinstance(fields, dict) or fields.get("format") != MANIFEST_FORMAT:
        raise ValueError(f"it does not say format {MANIFEST_FORMAT!r}")
    version = fields.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"impossible format_version {version!r}")
    if version > MANIFEST_VERSION:
        raise CheckpointError(
            f"{where} has format version {version}, this program reads up to version {MANIFEST_VERSION}: "
            "update it, or convert the checkpoint again"
        )


def _check_arrays(manifest: Manifest, where: Path) -> None:
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
        f"{part}/{name}": record for part, records in manifest.array_records.items() for name, record in records.items()
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
        raise CheckpointError(f"{where} does not fit its own config.\n  " + "\n  ".join(problems))
