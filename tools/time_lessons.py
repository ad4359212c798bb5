"""Seconds of one core that each notebook takes, from a report of their tests, into tools/times.json, which the site shows; `make times`.

Usage: python tools/time_lessons.py REPORT.xml, written by `pytest --junitxml REPORT.xml tests/test_notebooks.py`.
"""
import json, sys
import xml.etree.ElementTree as ET
from pathlib import Path

from sd_deepdive.checks import whole_file

RECORD = Path(__file__).with_name('times.json')


def times(report):
    "Seconds by notebook, of those that passed."
    cases = [c for c in ET.parse(report).iter('testcase') if c.get('name').startswith('test_notebook[') and c.find('failure') is None]
    return {c.get('name')[14:-1]: float(p.get('value')) for c in cases for p in c.iter('property') if p.get('name') == 'seconds'}


def main():
    "Add what the report holds to the record."
    if not (new := times(sys.argv[1])): sys.exit(f'{sys.argv[1]} holds no notebook that passed: give a report of tests/test_notebooks.py.')
    record = json.loads(RECORD.read_text()) | new
    with whole_file(RECORD) as part: part.write_text(json.dumps(dict(sorted(record.items())), indent=1) + '\n')
    print(*(f'{name}: {s} s' for name, s in new.items()), sep='\n')


if __name__ == '__main__': main()
