"""Drop the JPEG that IPython saves beside each PNG of a PIL picture: it would double the size of the notebooks."""
from fastcore.nbio import read_nb, write_nb
from nbdev.doclinks import nbglob

for path in nbglob(as_path=True):
    nb = read_nb(path)
    for cell in nb.cells:
        for out in cell.get('outputs', []):
            if 'image/png' in out.get('data', {}): out['data'].pop('image/jpeg', None)
    write_nb(nb, path)
