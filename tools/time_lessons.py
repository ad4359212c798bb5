"""Seconds of one core that each notebook takes, written to tools/times.json, which the site shows; `make times`."""
import json, os, resource, subprocess, sys
from pathlib import Path

from fastprogress import progress_bar

ROOT = Path(__file__).parents[1]
RECORD = ROOT/'tools/times.json'


def seconds(nb):
    "Processor time of one notebook, run by nbdev in a process of its own with one thread."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([Path(sys.executable).with_name('nbdev-test'), nb, '--n-workers', '0'], check=True, capture_output=True,
                   cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS='1'))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


def main():
    "Time the notebooks that are named, or all; the record of the others is kept."
    names = sys.argv[1:] or sorted(p.name for p in (ROOT/'nbs').glob('[0-9]*.ipynb'))
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in progress_bar(names, leave=False):
        record[name] = seconds(ROOT/'nbs'/name)
        part = RECORD.with_suffix('.part')
        part.write_text(json.dumps(dict(sorted(record.items())), indent=1) + '\n')
        part.replace(RECORD)
        print(f'{name}: {record[name]} s')


if __name__ == '__main__': main()
