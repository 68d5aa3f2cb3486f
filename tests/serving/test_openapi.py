"""The server's own OpenAPI schema, fuzzed: no 5xx, no undocumented answer, nothing unvalidated."""

from __future__ import annotations

import pytest

from collm.serving.service import Limits
from tests.serving.running import running

schemathesis = pytest.importorskip("schemathesis")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # schemathesis' own
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_no_generated_request_breaks_the_server(path, mode):
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
        negative_data_rejection,
    ]  # fmt: skip
    with running(limits=Limits(max_tokens=8)) as server:
        schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
        (operation,) = schema[path].values()

        tried = []

        @settings(
            max_examples=150, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        def fuzz(case):
            if mode == "positive" and isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "tiny"  # beyond "there is no such model"
            case.call_and_validate(checks=checks)
            tried.append(case)

        fuzz()
        assert tried
        assert server.service.admitted == 0
