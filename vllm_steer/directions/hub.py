"""Directions on the Hugging Face Hub, by ``hf://owner/repository/path``."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_steer.directions.quoting import MOST_QUOTED, one_line
from vllm_steer.errors import BadDirectionFile

PREFIX = "hf://"
WEB = re.compile(r"https?:/", re.IGNORECASE)
"""How a web address begins, also one that passed through a ``Path``, which has only one slash."""
_PAGE = re.compile(
    r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/(?:blob|resolve|raw|tree)/([^/?#]+)/([^?#]+)",
    re.IGNORECASE,
)
_URL = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?/([^@]+)")


def hub_address(page: str) -> str:
    """The address of what a web page of the Hub shows; its form, if the page is another one."""
    match = _PAGE.match(page)
    if match is None:
        return f"{PREFIX}owner/repository/path"
    repository, revision, path = match.groups()
    return f"{PREFIX}{repository}{'' if revision == 'main' else f'@{revision}'}/{path}"[:MOST_QUOTED]


def fetched(url: str) -> Path:
    """The local copy of a file or folder on the Hub: from the cache, else downloaded.

    Args:
        url: ``hf://owner/repository/path`` or ``hf://owner/repository@revision/path``. Environment variables of
            huggingface_hub apply: ``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_TOKEN``.

    Raises:
        BadDirectionFile: it is no such address, or the Hub or the cache does not have it.
    """
    match = _URL.fullmatch(url)
    if match is None or ".." in Path(match[3]).parts:
        raise BadDirectionFile(
            f"{url!r:.{MOST_QUOTED}} is no address of a file; allowed: hf://owner/repository/path, or "
            "hf://owner/repository@revision/path. Correct it."
        )
    repository, revision, path = match.groups()
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError:
        raise BadDirectionFile(f"{url} needs the package huggingface_hub; install it, or give a local path.") from None
    path = path.rstrip("/")
    # What stands beside a file and explains it.
    beside = [f"{path.rpartition('.')[0] or path}*.json", f"{path.rpartition('/')[0]}/metadata.json".lstrip("/")]
    try:
        snapshot = Path(snapshot_download(repository, revision=revision, allow_patterns=[path, f"{path}/*", *beside]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise BadDirectionFile(
            f"{url} could not be fetched ({one_line(error)}); allowed: what the Hub or the local cache has. Check the "
            "address, HF_TOKEN and HF_HUB_OFFLINE."
        ) from None
    found = snapshot / path
    if not found.exists():
        raise BadDirectionFile(f"{url} is not in the repository, or not in the local cache; check the path.")
    return found
