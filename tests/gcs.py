"""A Google Cloud Storage on loopback, for tests of `gs://` paths."""

import contextlib
import http
import os
import socket

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read when gcsfs is imported; the emulator knows no bucket layouts

import gcsfs
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import HANDLERS, create_server

BUCKET = "bucket"


@contextlib.contextmanager
def emulator():
    """Starts the emulator and points gcsfs, Orbax and tensorstore to it, before any of them is first used."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    address = f"http://localhost:{port}"
    settings = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    originals = {name: getattr(objects, name) for name in PATCHES}
    for name, patch in PATCHES.items():
        setattr(objects, name, patch(originals[name]))
    table = [(handlers, method, handler) for _, handlers in HANDLERS for method, handler in handlers.items()]
    for handlers, method, handler in table:
        if handler.__name__ in ("insert", "delete"):
            handlers[method] = _with_preconditions(handler)
    server = create_server("localhost", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    gcsfs.GCSFileSystem.clear_instance_cache()  # what an earlier emulator held, at another port
    try:
        yield f"gs://{BUCKET}"
    finally:
        server.stop()
        for handlers, method, handler in table:
            handlers[method] = handler
        for name, original in originals.items():
            setattr(objects, name, original)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _with_generation(download):
    """The real service names an object's generation when it is read; tensorstore cannot replace a file without it."""

    def answer(request, response, storage, *args, **kwargs):
        download(request, response, storage, *args, **kwargs)
        with contextlib.suppress(Exception):  # not found: `download` has answered that
            held = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = held["generation"]

    return answer


def _remembers_finished_uploads(upload_partial):
    """The real service says of an upload that is complete that it is, to a client which never got the answer and sends its end again."""

    def answer(request, response, storage, *args, **kwargs):
        upload_partial(request, response, storage, *args, **kwargs)
        if response.status == http.HTTPStatus.NOT_FOUND:
            with contextlib.suppress(Exception):  # not found: `upload_partial` has answered that
                held = storage.get_file_obj(request.params["bucket_name"], request.query["name"][0])
                response.status = http.HTTPStatus.OK
                response.json(held)

    return answer


def _with_preconditions(handle):
    """The real service writes or deletes an object only if its generation is the one that is asked for; 0 means that there is none.

    Here for locks alone: the emulator's other answers do not keep generations as tensorstore expects them.
    """

    def answer(request, response, storage, *args, **kwargs):
        wanted = request.query.get("ifGenerationMatch")
        name = request.params.get("object_id") or request.query.get("name", [None])[0]
        if name is None and isinstance(request.data, dict):
            name = request.data.get("meta", {}).get("name")
        held = None
        with contextlib.suppress(Exception):  # not found
            held = storage.get_file_obj(request.params["bucket_name"], name)
        if wanted and str(name).endswith(".lock") and str(held["generation"] if held else 0) != wanted[0]:
            response.status = http.HTTPStatus.PRECONDITION_FAILED
            return
        handle(request, response, storage, *args, **kwargs)

    return answer


PATCHES = {"download": _with_generation, "upload_partial": _remembers_finished_uploads}
