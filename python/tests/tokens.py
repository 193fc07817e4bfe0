"""A cluster's signatures for tests: RS256 by openssl, as an API server signs by default."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from pathlib import Path
from typing import Any


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Cluster:
    """Signs tokens of service accounts, and publishes its key in ``keys``."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.keys = place / "keys.json"
        self._key = place / "key.pem"
        self._openssl("genrsa", "-out", str(self._key), "2048")
        said = self._openssl("rsa", "-in", str(self._key), "-noout", "-modulus")
        modulus = bytes.fromhex(said.decode().strip().removeprefix("Modulus="))
        key = {"kty": "RSA", "alg": "RS256", "use": "sig", "kid": "k1"}
        key |= {"n": _b64(modulus), "e": _b64(b"\1\0\1")}
        self.keys.write_text(json.dumps({"keys": [key]}))
        place.chmod(0o755)
        self.keys.chmod(0o644)

    def _openssl(self, *args: str, data: bytes = b"") -> bytes:
        command = ["openssl", *args]
        return subprocess.run(command, input=data, capture_output=True, check=True).stdout

    def token(self, namespace: str, account: str, **claims: Any) -> str:
        """As the kubelet puts it into a projected volume; ``claims`` replace those."""
        now = int(time.time())
        bound = {
            "namespace": namespace,
            "serviceaccount": {"name": account, "uid": "s"},
            "pod": {"name": "trainer-0", "uid": "p"},
        }
        body = {"aud": ["tierkeep"], "iat": now, "nbf": now, "exp": now + 3600}
        body |= {"iss": "https://kubernetes.default.svc", "kubernetes.io": bound} | claims
        parts = [{"alg": "RS256", "kid": "k1"}, body]
        said = ".".join(_b64(json.dumps(part).encode()) for part in parts)
        signed = self._openssl("dgst", "-sha256", "-sign", str(self._key), data=said.encode())
        return f"{said}.{_b64(signed)}"
