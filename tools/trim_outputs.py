"""Drop what a saved notebook need not hold: the JPEG that IPython saves beside each PNG, widgets, which nothing answers, progress bars, and the
bytes that a PNG can do without (where oxipng is installed, which has no wheels for the newest Python). No pixel changes."""
import base64

from fastcore.nbio import read_nb, write_nb
from nbdev.doclinks import nbglob
from sd_deepdive.checks import whole_file

try: import oxipng
except ImportError: oxipng = None


def is_widget(out):
    "Whether an output is an explorer: its view, or its text where a view could not be made."
    data = out.get('data', {})
    return any('widget' in kind for kind in data) or ''.join(data.get('text/plain', '')).startswith('VBox(')


def is_bar(out):
    "Whether an output is a progress bar: what tqdm writes where it takes long."
    text = ''.join(out.get('text', ''))
    return out.get('name') == 'stderr' and ('it/s' in text or 's/it' in text)


def smaller(png):
    "The same picture in fewer bytes, base64 as it was; a film stays as it is."
    old = base64.b64decode(''.join(png))
    if b'acTL' in old or not oxipng: return png
    new = oxipng.optimize_from_memory(old, level=4, strip=oxipng.StripChunks.safe())
    return base64.b64encode(new).decode() + '\n' if len(new) < len(old) else png


def trim(path):
    "Trim one notebook, which is replaced as a whole."
    nb = read_nb(path)
    for cell in nb.cells:
        if 'outputs' not in cell: continue
        cell.outputs = [out for out in cell.outputs if not is_widget(out) and not is_bar(out)]
        for out in cell.outputs:
            data = out.get('data', {})
            if 'image/png' not in data: continue
            data.pop('image/jpeg', None)
            data['image/png'] = smaller(data['image/png'])
    with whole_file(path) as part: write_nb(nb, part)


if __name__ == '__main__':
    for path in nbglob(as_path=True): trim(path)
