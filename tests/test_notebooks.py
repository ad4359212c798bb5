"""One test a notebook, run by nbdev's own runner: `#| eval: false` and the flags in `tst_flags` hold (NB_FLAGS=slow runs flagged cells)."""
import os, resource

import pytest
from conftest import CFG, NBS, apart
from nbdev.test import test_nb as run_notebook

run_notebook.__test__ = False
FLAGS = os.environ.get('NB_FLAGS', '').split()
TIMEOUT = 1800 if 'slow' in FLAGS else CFG.cell_timeout     # seconds for a cell


@pytest.fixture
def timed(record_property):
    "The processor time of the test's own process goes into the report (`--junitxml`), for tools/time_lessons.py."
    def seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime
    start = seconds()
    yield
    record_property('seconds', round(seconds() - start, 1))


@pytest.mark.parametrize('nb', NBS, ids=lambda p: p.name)
@apart
def test_notebook(nb, offline, timed, capfd):
    "Every cell runs and every assert in it holds, with no network."
    ok, _ = run_notebook(nb, skip_flags=CFG.tst_flags.split(), force_flags=FLAGS, basepath=CFG.config_path, cell_timeout=TIMEOUT)
    assert ok, capfd.readouterr().err[-3000:]
