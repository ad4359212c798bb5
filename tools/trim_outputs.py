"""Drop what a saved notebook need not hold: the JPEG that IPython saves beside each PNG, and widgets, which nothing answers."""
from fastcore.nbio import read_nb, write_nb
from nbdev.doclinks import nbglob


def is_widget(out):
    "Whether an output is an explorer: its view, or its text where a view could not be made."
    data = out.get('data', {})
    return any('widget' in kind for kind in data) or ''.join(data.get('text/plain', '')).startswith('VBox(')


for path in nbglob(as_path=True):
    nb = read_nb(path)
    for cell in nb.cells:
        if 'outputs' not in cell: continue
        cell.outputs = [out for out in cell.outputs if not is_widget(out)]
        for out in cell.outputs:
            if 'image/png' in out.get('data', {}): out['data'].pop('image/jpeg', None)
    write_nb(nb, path)
