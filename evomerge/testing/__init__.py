"""Contract suites that every plug-in can run, and the tiny families that the tests search."""

import sys

if "pytest" in sys.modules:  # so that a suite that fails shows the values, wherever it was inherited
    import pytest

    pytest.register_assert_rewrite(
        *(f"{__name__}.{suite}" for suite in ("methods", "factors", "searchers", "evaluators", "pools"))
    )
