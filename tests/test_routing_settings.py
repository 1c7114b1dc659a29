"""What of `[[composite]]` and `[routing]` is refused, and how that is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from pybroker.config import CompositeEntry
from pybroker.errors import ConfigurationError
from pybroker.settings import load_config, make_config

GOOD = {"name": "/queue/a", "forward_to": ["/queue/b"]}


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ({"composite": {}}, "composite: expected a list of tables"),
        ({"composite": [GOOD] * 1_001}, "composite: expected at most 1000 entries, got 1001"),
        ({"composite": [1]}, "composite[0]: expected a table"),
        ({"composite": [{"forward_to": ["/queue/b"]}]}, "composite[0].name: expected a destination"),
        ({"composite": [{**GOOD, "name": 1}]}, "composite[0].name: expected text, got 1"),
        ({"composite": [{**GOOD, "name": "a"}]}, "composite[0].name: destination 'a' is not known"),
        ({"composite": [{"name": "/queue/a"}]}, "composite[0].forward_to: expected a list of 1 to"),
        ({"composite": [{**GOOD, "forward_to": []}]}, "composite[0].forward_to: expected a list of 1 to"),
        ({"composite": [{**GOOD, "forward_to": [1]}]}, "composite[0].forward_to[0]: expected a destination"),
        ({"composite": [{**GOOD, "forward_to": ["/queue/*"]}]}, "composite[0].forward_to[0]: expected one name"),
        (
            {"composite": [{**GOOD, "forward_only": "no"}]},
            "composite[0].forward_only: expected true or false, got 'no'",
        ),
        ({"composite": [{**GOOD, "filter": "a ="}]}, "composite[0].filter: "),
        ({"composite": [{**GOOD, "to": "x"}]}, "composite[0].to: no field has this name"),
        ({"routing": {"virtual_topics": "a..b"}}, "routing.virtual_topics: "),
        (
            {"routing": {"virtual_consumers": "Consumer.*"}},
            "routing.virtual_consumers: expected parts that end in a dot",
        ),
        ({"routing": {"virtual_consumers": ".a."}}, "routing.virtual_consumers: expected parts that end in a dot"),
        ({"routing": {"virtual_consumers": "a..b."}}, "routing.virtual_consumers: "),
        ({"routing": {"mirrored_queues": ["/topic/a"]}}, "routing.mirrored_queues[0]: expected a pattern of queues"),
        ({"routing": {"mirrored_queues": ["a"]}}, "routing.mirrored_queues[0]: "),
        (
            {"composite": [{**GOOD, "forward_to": ["/topic/ActiveMQ.Advisory.Connection"]}]},
            "composite[0].forward_to[0]: expected another topic, for only the broker itself sends to advisories",
        ),
        (
            {"routing": {"mirror_prefix": "ActiveMQ.Advisory."}},
            "routing.mirror_prefix and mirror_suffix: expected another topic",
        ),
        ({"routing": {"mirror_prefix": "a,"}}, "routing.mirror_prefix and mirror_suffix: "),
        ({"routing": {"mirrored_queues": "a"}}, "routing.mirrored_queues: expected a list of texts"),
    ],
)
def test_what_is_refused(overrides: dict[str, object], fault: str):
    with pytest.raises(ConfigurationError) as caught:
        make_config(**overrides)
    assert fault in str(caught.value)


def test_from_a_file(tmp_path: Path):
    path = tmp_path / "pybroker.toml"
    path.write_text(
        """
        [routing]
        mirrored_queues = ["/queue/>"]
        [[composite]]
        name = "/queue/a"
        forward_to = ["/queue/b", "/topic/c"]
        forward_only = false
        filter = "ward = 3"
        """
    )
    config = load_config(path)
    assert config.routing.mirrored_queues == ("/queue/>",)
    forward_to = ("/queue/b", "/topic/c")
    entry = CompositeEntry(name="/queue/a", forward_to=forward_to, forward_only=False, filter="ward = 3")
    assert config.composite == (entry,)
    assert make_config(config).composite == config.composite
