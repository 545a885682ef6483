"""Signed models: with a public key configured, only the bundle that its owner signed is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pipeline import registry_of

import vae
from flows import registry
from flows.config import Sign
from flows.registry import PUBLIC_KEY
from flows.sign import SIGNATURE, sign
from flows.tracking import client
from vae.bundle import to_files
from vae.model import build

pytest.importorskip("model_signing", reason="the extra 'signing' is not installed")
NAME, MODEL = "signed", "models:/signed/1"


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Files of a private key and of its public one."""
    from cryptography.hazmat.primitives import serialization as to
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.key", folder / f"{name}.pem"
    private.write_bytes(key.private_bytes(to.Encoding.PEM, to.PrivateFormat.PKCS8, to.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(to.Encoding.PEM, to.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A registry with one version, whose files a test may write over."""
    with registry_of(tmp_path):
        write(tmp_path, seed=0)
        client().create_registered_model(NAME)
        client().create_model_version(NAME, (tmp_path / "model").as_uri())
        yield tmp_path


def write(root: Path, seed: int) -> None:
    """A whole bundle whose digests agree, as anybody may write it who can write to the registry."""
    bundle = root / "model" / registry.BUNDLE
    bundle.mkdir(parents=True, exist_ok=True)
    model = build(vae.FlatConfig(height=8, width=8, channels=1, latent_dim=2), seed)
    for name, content in to_files(model, {"decode": {}}).items():
        (bundle / name).write_bytes(content)


def test_only_what_was_signed_is_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = key_pair(root, "ours")
    assert registry.locate(MODEL).version == "1", "without a key nothing is asked"
    monkeypatch.setenv(PUBLIC_KEY, str(public))
    with pytest.raises(ValueError, match="models:/signed/1 is not signed"):
        registry.locate(MODEL)
    assert sign(Sign(root=root, model=MODEL, key=private)).changed
    assert registry.locate(MODEL).facts()["format"] == 1

    write(root, seed=1)
    with pytest.raises(
        ValueError, match=r"not what .*ours\.pem has signed: .*mismatch for 'manifest\.json'"
    ) as told:
        registry.locate(MODEL)
    assert "\n" not in str(told.value)
    write(root, seed=0)
    registry.locate(MODEL)
    (root / "model" / registry.BUNDLE / "more.py").write_text("")
    with pytest.raises(ValueError, match="has signed"):
        registry.locate(MODEL)


def test_another_key_or_a_broken_signature_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, _ = key_pair(root, "theirs")
    _, public = key_pair(root, "ours")
    sign(Sign(root=root, model=MODEL, key=private))
    monkeypatch.setenv(PUBLIC_KEY, str(public))
    with pytest.raises(ValueError, match="has signed"):
        registry.locate(MODEL)
    registry.set_tag(NAME, "1", SIGNATURE, "{}")
    with pytest.raises(ValueError, match="has signed"):
        registry.locate(MODEL)


def test_what_can_not_be_signed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no key in"):
        Sign(root=tmp_path, model=MODEL, key=tmp_path / "none")
    with pytest.raises(ValueError, match="a signature is kept there"):
        Sign(root=tmp_path, model="folder", key=tmp_path)
