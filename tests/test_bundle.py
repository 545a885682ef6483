"""The bundle: the same model back, and nothing that is not exactly it."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from vae.bundle import CONFIG, MANIFEST, WEIGHTS, from_files, load, read_config, to_files, weights_digest
from vae.config import AutoencoderConfig, FlatConfig, ModelConfig
from vae.encode import Encoder
from vae.model import build

SMALL = {"height": 8, "width": 9, "channels": 3, "latent_dim": 2, "hidden": (4, 5)}
CONFIGS: list[ModelConfig] = [
    FlatConfig.from_dict(SMALL),
    FlatConfig.from_dict(SMALL | {"network": "residual", "prior": "vamp", "pseudo_inputs": 3}),
    FlatConfig.from_dict(SMALL | {"likelihood": "optimal_gaussian"}),
    AutoencoderConfig.from_dict(SMALL | {"corruption": "downscale", "corruption_strength": 2}),
]
EXTRA = {"decode": {"height": 8}, "dataset": "ab12"}


def rewritten(files: dict[str, bytes], name: str, content: bytes) -> dict[str, bytes]:
    """A forged bundle whose manifest agrees with its content."""
    manifest = json.loads(files[MANIFEST])
    manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    return files | {name: content, MANIFEST: (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()}


@pytest.mark.parametrize("config", CONFIGS)
def test_the_same_model_comes_back(config: ModelConfig, tmp_path: Path) -> None:
    model = build(config, seed=7)
    files = to_files(model, EXTRA)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    back = load(tmp_path)
    assert back.config == config
    assert back.extra == EXTRA == read_config(files)["extra"]
    assert not back.training
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 9), dtype=np.uint8)
    ours, theirs = (Encoder(m).encode(images, range(5), scores=True) for m in (model, back))
    assert np.array_equal(ours.mu, theirs.mu)
    assert np.array_equal(ours.log_likelihood, theirs.log_likelihood)  # type: ignore[arg-type]
    assert to_files(back) == files
    assert weights_digest(back) == weights_digest(model) == weights_digest(files)


def test_a_loaded_model_keeps_the_memory_layout_it_was_built_with() -> None:
    model = build(CONFIGS[0])
    back = from_files(to_files(model))
    for built, loaded in zip(model.parameters(), back.parameters(), strict=True):
        assert built.stride() == loaded.stride()
        assert loaded.requires_grad


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_an_altered_byte_is_refused(name: str) -> None:
    files = to_files(build(CONFIGS[0]))
    content = bytearray(files[name])
    for position in range(0, len(content), max(1, len(content) // 50)):
        content[position] ^= 1
        with pytest.raises(ValueError, match=f"{name} of the bundle is not the file that"):
            from_files(files | {name: bytes(content)})
        content[position] ^= 1


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, MANIFEST])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    for other, content in to_files(build(CONFIGS[0])).items():
        if other != name:
            (tmp_path / other).write_bytes(content)
    with pytest.raises(ValueError, match=f"the bundle lacks {name}"):
        load(tmp_path)


class Payload:
    """A pickle that would leave a mark."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("the pickle was run",))


def test_a_pickle_in_place_of_weights_is_data_that_cannot_be_read() -> None:
    files = to_files(build(CONFIGS[0]))
    with pytest.raises(ValueError, match="cannot be read"):
        from_files(rewritten(files, WEIGHTS, pickle.dumps(Payload())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "os:system"}, "model='os:system' is not one of"),
        ({"latent_dim": 60_000}, "the model needs"),
        ({"hidden": [4, 5, 6]}, "names differ"),
        ({"shell": "rm"}, "unknown field 'shell' of FlatConfig"),
    ],
)
def test_a_forged_configuration_is_refused(change: dict[str, object], message: str) -> None:
    files = to_files(build(CONFIGS[0]))
    config = json.loads(files[CONFIG])
    config["model"] |= change
    with pytest.raises(ValueError, match=message):
        from_files(rewritten(files, CONFIG, json.dumps(config).encode()))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"format": 2}', b"[" * 100_000])
def test_a_configuration_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        from_files(rewritten(to_files(build(CONFIGS[0])), CONFIG, content))


def test_weights_of_another_type_are_refused() -> None:
    files = to_files(build(CONFIGS[0]))
    whole = {name: t.to(torch.int32) for name, t in safetensors.torch.load(files[WEIGHTS]).items()}
    with pytest.raises(ValueError, match="int32"):
        from_files(rewritten(files, WEIGHTS, safetensors.torch.save(whole)))


@pytest.mark.parametrize("size", [2**63, 2**40, 200])
def test_a_lying_header_is_refused(size: int) -> None:
    files = to_files(build(CONFIGS[0]))
    with pytest.raises(ValueError, match="cannot be read"):
        from_files(rewritten(files, WEIGHTS, size.to_bytes(8, "little") + files[WEIGHTS][8:]))
