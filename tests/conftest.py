"""Tests marked `slow` run only when asked for: SLM_SLOW=1 pytest."""
import os
import signal

import pytest

# The longest files come first, so that no worker is left with one when the rest is done; --no-loadscope-reorder keeps this order.
LONGEST = [f"test_{name}.py" for name in ("run", "serve", "fast_tokenizer", "cli", "tokenizer", "style", "sample", "pretrain", "evaluate",
                                          "data", "model", "distributed", "chat_page", "subwords")]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs only with SLM_SLOW=1")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:      # a shell starts `command &` so, and every test of Ctrl-C would wait in vain
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if not os.environ.get("SLM_SLOW"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set SLM_SLOW=1"))
