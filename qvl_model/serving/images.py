"""Images of requests: data in the request itself, or, where that is allowed, fetched from public addresses."""

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from qvl_model.images import load_image

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["image_of"]

SECONDS = 10.0  # for an address to answer


def image_of(url: str, *, max_pixels: int, max_bytes: int, fetch: bool) -> "Image":
    """The image of a ``data:`` URL, or with ``fetch`` of an http or https URL on a public address.

    Raises: ValueError, with a reason that the client may see.
    """
    scheme = url[:10].partition(":")[0].lower()
    if scheme == "data":
        content = _data(url)
    elif scheme in ("http", "https") and fetch:
        content = _fetched(url, max_bytes)
    else:
        also = ", and http(s): of public addresses" if fetch else ""
        raise ValueError(f"images are taken as data: URLs (data:image/png;base64,...){also}; not {scheme or 'this'}:")
    width, height = load_image(content, decode=False).size
    if width * height > max_pixels:
        raise ValueError(f"an image of {width} x {height} pixels is more than the {max_pixels} that this server takes")
    return load_image(content)


def _data(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError("a data: URL of an image must be base64: data:image/png;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data: URL of an image is not base64 ({error})") from error


def _fetched(url: str, max_bytes: int) -> bytes:
    """The content of a URL. The address that was checked is the one that is connected to, and nothing is followed."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if parts.scheme.lower() == "https" else 80)
        if not host or parts.username or parts.password:
            raise ValueError("no host, or a password")
        address = _public_address(host, port)
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
        raw = socket.create_connection((address, port), timeout=SECONDS)
        secure = parts.scheme.lower() == "https"
        connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if secure else raw
        try:
            path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
            connection.request("GET", path, headers={"Accept": "image/*"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"it answered with status {answer.status}")
            content = answer.read(max_bytes + 1)
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"the image at a URL cannot be fetched: {' '.join(str(error).split())[:200]}") from error
    if len(content) > max_bytes:
        raise ValueError(f"the image at a URL has more than {max_bytes} bytes")
    return content


def _public_address(host: str, port: int) -> str:
    """An address of a host all of whose addresses are public. Raises: ValueError; OSError for an unknown host."""
    found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        ip = ipaddress.ip_address(str(address).partition("%")[0])
        mapped = getattr(ip, "ipv4_mapped", None)
        if not (mapped or ip).is_global or (mapped or ip).is_multicast:
            raise ValueError("its address is not public")
    return str(found[0])
