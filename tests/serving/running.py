"""A real server on loopback: uvicorn in a thread, tiny models, transformers engines."""

from __future__ import annotations

import contextlib
import threading
import time

import uvicorn

from collm.configuration import DeferralConfig
from collm.engines.transformers import TransformersEngine
from collm.serving.app import create_app
from collm.serving.service import Limits, Service
from tests.conftest import tiny_collm, tiny_model, tiny_tokenizer

CALIBRATION = [{"rate": 0.1, "threshold": 0.8}, {"rate": 0.5, "threshold": 0.4}]


class Running:
    """A server that listens; `url`, `service`, and the models behind it."""

    def __init__(self, service, base, assistants, **options):
        self.service, self.base, self.assistants = service, base, assistants
        config = uvicorn.Config(create_app(service, **options), port=0, log_level="error", timeout_graceful_shutdown=5)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        self.server.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()


def make_service(num_assistants=1, helpers=None, limits=None, **options):
    base = tiny_collm(num_assistants=num_assistants)
    models = [tiny_model(seed=k) for k in range(1, num_assistants + 1)]
    engines = helpers or [TransformersEngine(m, f"assistant-{k}") for k, m in enumerate(models, 1)]
    deferral = DeferralConfig(num_assistants=num_assistants, calibration=CALIBRATION)
    service = Service(
        "tiny", TransformersEngine(base, "base"), engines, tiny_tokenizer(), deferral,
        limits=limits or Limits(), eos_ids=frozenset([2]), **options,
    )  # fmt: skip
    return service, base, models


@contextlib.contextmanager
def running(num_assistants=1, helpers=None, limits=None, app=None, **options):
    service, base, models = make_service(num_assistants, helpers, limits, **options)
    server = Running(service, base, models, **(app or {}))
    try:
        yield server
    finally:
        server.stop()
