"""Set-up says in one line what is missing, and makes again what cannot be used."""
import os, re, shutil, subprocess, sys, venv
from importlib.metadata import distributions, metadata

import pytest, yaml
from conftest import ROOT
from packaging.specifiers import SpecifierSet


@pytest.fixture
def setup_env(monkeypatch):
    "The set-up script as a module."
    monkeypatch.syspath_prepend(ROOT/'tools')
    import setup_env
    return setup_env


def one_line(setup_env, err):
    "The line that set-up ends on when a command has failed with `err`."
    with pytest.raises(SystemExit) as e: setup_env.explain(err)
    assert e.value.code.startswith('set-up: ') and '\n' not in e.value.code
    return e.value.code


@pytest.mark.parametrize('err, words', [
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", 'disk is full'),
    ("WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)': /simple/torch/\n"
     "ERROR: No matching distribution found for torch==2.13.0", 'needs a network'),
    ("WARNING: Retrying (Retry(total=4)) after connection broken by 'ReadTimeoutError(...)': /simple/torch/\n"
     "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", 'disk is full'),
    ("ERROR: No matching distribution found for torch==2.13.0", 'no torch==2.13.0'),
    ("ERROR: Ignored the following versions that require a different python version: 4.1.2 Requires-Python >=3.11.5\n"
     "ERROR: Cannot install sd_deepdive because these package versions have conflicting dependencies.", 'wants Python >=3.11.5, this is'),
    ("The virtual environment was not created successfully because ensurepip is not\navailable.", 'python3-venv')])
def test_causes(setup_env, err, words):
    "Each known cause becomes one line that names it."
    assert words in one_line(setup_env, err)


def test_unknown_cause(setup_env):
    "An error it does not know is shown."
    with pytest.raises(SystemExit, match='something else'): setup_env.explain('something else')


def test_old_python(tmp_path):
    "A Python too old is named, with the one that is needed."
    (tmp_path/'settings.ini').write_text((ROOT/'settings.ini').read_text().replace('min_python = 3.', 'min_python = 99.'))
    res = subprocess.run([sys.executable, ROOT/'tools/setup_env.py', 'env'], cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode and res.stderr.count('\n') == 1 and 'Python 99.11 or newer is needed' in res.stderr


def test_untested_python(tmp_path):
    "A Python that the course is not tested on is named before anything is fetched; one that it is tested on is not."
    said, env = (ROOT/'settings.ini').read_text(), os.environ | {'PIP_NO_INDEX': '1'}
    for f in ('setup.py', 'pyproject.toml', 'lock.txt'): (tmp_path/f).write_text((ROOT/f).read_text())
    for tested, named in (f'{sys.version_info.major}.{sys.version_info.minor}', False), ('3.9', True):
        ini = re.sub(r'Python :: 3\.\d+', f'Python :: {tested}', said)
        (tmp_path/'settings.ini').write_text(ini)
        res = subprocess.run([sys.executable, ROOT/'tools/setup_env.py', 'env'], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert ('This is Python ' in res.stdout) == named, res.stdout


def test_one_set_of_pythons():
    "README, metadata and the workflow name the same Pythons, the lowest of which is required."
    tested = metadata('sd_deepdive').get_all('Classifier')
    tested = [c.rpartition(' ')[2] for c in tested if 'Python :: 3.' in c]
    workflow = yaml.safe_load((ROOT/'.github/workflows/test.yml').read_text())
    assert workflow['jobs']['test']['strategy']['matrix']['python'] == tested
    assert metadata('sd_deepdive')['Requires-Python'] == '>=' + tested[0]
    assert f'Python {", ".join(tested[:-1])} or {tested[-1]},' in (ROOT/'README.md').read_text()
    for name in 'CONTRIBUTING.md', 'CHANGELOG.md': assert f'{tested[0]} to {tested[-1]}' in (ROOT/name).read_text()


def test_nothing_to_be_had(tmp_path):
    "With no index to ask, set-up ends on one line."
    for f in ('settings.ini', 'setup.py', 'pyproject.toml', 'lock.txt'): (tmp_path/f).write_text((ROOT/f).read_text())
    env = {k: v for k, v in os.environ.items() if not k.startswith('PIP_')} | {'PIP_NO_INDEX': '1'}
    res = subprocess.run([sys.executable, ROOT/'tools/setup_env.py', 'env'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert res.returncode and res.stderr.count('\n') == 1 and 'pip finds no' in res.stderr


def test_locked_for_every_python():
    "Each locked version allows the oldest Python that the README names, in its first release."
    oldest = metadata('sd_deepdive')['Requires-Python'].removeprefix('>=') + '.0'
    wants = {d.name: d.metadata.get('Requires-Python') for d in distributions()}
    assert not {name: want for name, want in wants.items() if want and not SpecifierSet(want).contains(oldest)}


def test_stale(setup_env, tmp_path):
    "An environment that was moved, or is of another Python, or of one that is gone, is seen."
    place, moved = tmp_path/'an env', tmp_path/'moved'
    venv.create(place)
    assert not setup_env.stale(str(place))
    shutil.copytree(place, moved, symlinks=True)
    assert setup_env.stale(str(moved))
    config = place/'pyvenv.cfg'
    said = config.read_text()
    for was, now in ('\nversion = ', '\nversion = 9'), ('\nexecutable = ', '\nexecutable = /gone'):
        config.write_text(said.replace(was, now))
        assert setup_env.stale(str(place))
    config.write_text(said)
    assert not setup_env.stale(str(place))


def test_moved_folder(tmp_path):
    "make sets up once, and once more when its folder was moved."
    here = tmp_path/'with space'
    (here/'tools').mkdir(parents=True)
    for f in ('Makefile', 'settings.ini', 'setup.py', 'pyproject.toml', 'lock.txt'): shutil.copy(ROOT/f, here)
    (here/'tools'/'setup_env.py').write_text('import os; os.makedirs(".venv", exist_ok=True); print("set up")')
    make = lambda: subprocess.run(['make', '.venv/.ready', f'PYTHON={sys.executable}'], cwd=here, capture_output=True, text=True, check=True).stdout
    assert 'set up' in make() and 'set up' not in make()
    here = here.rename(tmp_path/'moved')
    assert 'set up' in make() and 'set up' not in make()
