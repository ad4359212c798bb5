"""Lessons on a machine like Colab's or Kaggle's: the notebook alone, an image with torch in it, nothing of ours until the first cell has run."""
import ast, json, os, re, shutil, sys
from pathlib import Path

import pytest
from conftest import CFG, NBS, run
from fastcore.nbio import read_nb

LESSONS = {'01_text_to_image': '## Seeds', '12_tokenizer_by_hand': '## Equal to the library'}   # run as far as this heading
ADDRESS = f'git+https://github.com/{CFG.user}/{CFG.repo}'
CELL = f'''#| hide
from importlib.metadata import version
from importlib.util import find_spec
if find_spec('{CFG.lib_name}') is None:    # on Colab or Kaggle: what goes with their GPU stays as it is
    kept = ' '.join(f'{{name}}=={{version(name)}}' for name in ('torch', 'torchvision', 'numpy') if find_spec(name))
    %pip install -q $kept {ADDRESS}'''

RUN = '''
import json, sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel()
said = []
def hear(message):
    if message["header"]["msg_type"] == "stream": said.append(message["content"]["text"])
try:
    for source in json.load(open(sys.argv[1])):
        reply = client.execute_interactive(source, output_hook=hear, timeout=300)["content"]
        if reply["status"] != "ok": sys.exit("\\n".join([source, *reply.get("traceback", []), *said[-20:]]))
    print("".join(said))
finally: client.stop_channels(); manager.shutdown_kernel(now=True)
'''


@pytest.mark.parametrize('nb', [nb for nb in NBS if any('import' in c.source for c in read_nb(nb).cells if c.cell_type == 'code')], ids=lambda nb: nb.stem)
def test_first_cell(nb):
    "The first code cell installs what is missing, if it is; and nothing asks for a login."
    code = [c.source for c in read_nb(nb).cells if c.cell_type == 'code']
    assert nb.stem in ('index', 'glossary', 'questions') or code[0] == CELL
    assert not [source for source in code if re.search(r'\b(notebook_login|login|getpass|drive\.mount|input)\(', source)]


def image(folder):
    "An environment with all packages of this one but ours; gives its Python."
    view, env = folder/'packages', folder/'env'
    view.mkdir()
    for place in (Path(p) for p in sys.path if p.endswith(('site-packages', 'dist-packages'))):
        for entry in place.iterdir():
            ours = CFG.lib_name in entry.name or entry.suffix in ('.pth', '.egg-link')
            if not ours and not (view/entry.name).exists(): (view/entry.name).symlink_to(entry)
    run(sys.executable, '-m', 'venv', '--without-pip', env)
    site, = env.glob('[Ll]ib/**/site-packages')
    (site/'image.pth').write_text(f'{view}\n')
    return env/'bin'/'python', site


def asleep(source): return re.search(r'^#\| *(eval: *false|slow)', source, re.M)
def imports(source): return not asleep(source) and '%' not in source and all(isinstance(line, ast.Import | ast.ImportFrom) for line in ast.parse(source).body)


def cells(nb, until):
    "The code of a lesson: all cells as far as a heading, and of the rest those that import."
    run_all = True
    for cell in read_nb(nb).cells:
        run_all = run_all and not any(line.startswith(until) for line in cell.source.splitlines())
        if cell.cell_type == 'code' and not asleep(cell.source) and (run_all or imports(cell.source)): yield cell.source


def test_lessons_elsewhere(wheel, tmp_path):
    """Two lessons run, each as far as one of its headings, and all that the others import is there: the first cell installs our package and nothing
    else, torch stays, and no file is needed beside the notebook."""
    python, site = image(tmp_path)
    built, = wheel.parent.glob('*.whl')
    env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'PYTEST', 'VIRTUAL_ENV'))}
    env |= dict(PIP_NO_INDEX='1', PIP_DISABLE_PIP_VERSION_CHECK='1', OMP_NUM_THREADS='1', HOME=str(tmp_path), HF_HUB_OFFLINE='1')
    before = {f.name for f in site.iterdir()}
    everywhere = [c.source for nb in NBS for c in read_nb(nb).cells if c.cell_type == 'code' and imports(c.source)]
    for lesson, until in LESSONS.items():
        (tmp_path/lesson).mkdir()
        shutil.copy(CFG.nbs_path/f'{lesson}.ipynb', tmp_path/lesson)
        code = [source.replace(ADDRESS, str(built)) for source in cells(tmp_path/lesson/f'{lesson}.ipynb', until)]
        assert str(built) in code[0] and len(code) > 9
        if lesson == list(LESSONS)[-1]: code += everywhere
        code.append('import sd_deepdive, torch; print(sd_deepdive.__file__, torch.__file__)')
        (tmp_path/'cells.json').write_text(json.dumps(code))
        said = run(python, '-c', RUN, tmp_path/'cells.json', cwd=tmp_path/lesson, env=env)
        ours, torch = said.split()[-2:]
        assert Path(ours).is_relative_to(site) and Path(torch).is_relative_to(tmp_path/'packages')
    new = {f.name for f in site.iterdir()} - before
    assert {name.partition('-')[0] for name in new} == {CFG.lib_name} and len(new) == 2
