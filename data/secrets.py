"""Text without the credentials in it: for log lines, errors, and whatever else is kept."""

from __future__ import annotations

import os
import re

# A URL's user and password; a query's signature or token.
_IN_URL = re.compile(r"(?P<scheme>\w[\w+.-]*://)[^/@\s'\"]*:[^/@\s'\"]*@")
_SECRET_FIELD = r"(?:sig|token|[\w-]*(?:signature|secret|password|credential)[\w-]*)"
_IN_QUERY = re.compile(rf"(?i)(?P<name>[?&]{_SECRET_FIELD}=)[^&\s'\"]+")
_NAMED = re.compile(r"SECRET|PASSWORD|TOKEN|CREDENTIAL|API_KEY|ACCESS_KEY|ACCOUNT_KEY|AUTH_STRING|SAS_KEY")
_SHORTEST = 6  # characters of a variable's value that is taken for a secret: 'true' is none


def has_credentials(url: str) -> bool:
    """Whether a URL has a password, or a signature, in it.

    >>> has_credentials("s3://key:secret@bucket/images"), has_credentials("s3://bucket/images")
    (True, False)
    """
    return bool(_IN_URL.search(url) or _IN_QUERY.search(url))


def redact(text: str) -> str:
    """The text with *** for what is secret: in URLs, and the values of variables that are named so.

    >>> redact("no answer from http://me:open-sesame@host:5000/api")
    'no answer from http://***@host:5000/api'
    """
    text = _IN_QUERY.sub(r"\g<name>***", _IN_URL.sub(r"\g<scheme>***@", text))
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAMED.search(name) and value in text:
            text = text.replace(value, "***")
    return text
