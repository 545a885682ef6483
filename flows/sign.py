"""Sign: who made a model. A version's signature, of OpenSSF model-signing, is a tag of it in the registry.

Whoever can write to the registry can forge digests that agree, but no signature. Where VAE_FLOWS_PUBLIC_KEY
names a public key, a version from the registry is used only if its bundle is signed with the private one.
Keys are elliptic-curve ones in PEM; nothing here asks a server but the registry.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType

from flows import registry
from flows.config import Sign
from flows.registry import Located
from flows.results import Signed

SIGNATURE = "vae_flows.signature"


def sign(config: Sign) -> Signed:
    """Sign the bundle of a version, after its digests were checked."""
    found = registry.locate(config.model, verified=False)
    found.facts()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "signature")
        signer = _library().signing.Config().use_elliptic_key_signer(private_key=config.key)
        signer.sign(found.folder, file)
        registry.set_tag(found.name, found.version, SIGNATURE, file.read_text())
    return Signed(model=found.uri, changed=True)


def require_signed(found: Located, key: Path) -> None:
    """Refuse a version whose bundle the owner of this public key has not signed as it is."""
    signature = registry.tags(found.name, found.version).get(SIGNATURE)
    if not signature:
        raise ValueError(f"{found.uri} is not signed, and {registry.PUBLIC_KEY}={key} asks for it")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "signature")
        file.write_text(signature)
        verifier = _library().verifying.Config().use_elliptic_key_verifier(public_key=key)
        try:
            verifier.verify(found.folder, file)
        except Exception as error:  # whatever is wrong with a signature, the model is not used
            why = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{found.uri} is not what {key} has signed: {why[:100]}") from error


def _library() -> ModuleType:
    try:
        import model_signing
    except ImportError as error:
        raise ValueError("signatures need the extra: pip install 'vae-flows[signing]'") from error
    return model_signing
