"""Converts all estimators of `field.cases` and writes what became of each into docs/models.md.

In tests/, `python -m field` prints the table and `python -m field --write` puts it into the page.
"""

import argparse
import re

from field.refused import REFUSED
from field.scored import EQUAL, outcome
from field.table import BEGIN, DOCS, END, GROUPS, REFUSED_BEGIN, REFUSED_END, refused_row, row


def main() -> None:
    asked = argparse.ArgumentParser(prog="field", description=__doc__.partition("\n")[0])
    asked.add_argument("--write", action="store_true", help="write the table into docs/models.md")
    given = asked.parse_args()
    lines, equal, count = [], 0, 0
    for group, cases in GROUPS.items():
        lines += ["", f"| {group} | outcome |", "|---|---|"]
        for name, case in cases.items():
            result = outcome(case)
            count, equal = count + 1, equal + (result == EQUAL)
            lines.append(row(name, result))
            print(lines[-1], flush=True)
    head = f"{equal} of {count} estimators and pipelines convert, and score as the original does:"
    table = "\n".join([BEGIN, "", head, *lines, "", END])
    print(head)
    refusals = [refused_row(name) for name in REFUSED]
    second = "\n".join([REFUSED_BEGIN, "", "| what | message |", "|---|---|", *refusals, "", REFUSED_END])
    if given.write:
        text = re.sub(f"{BEGIN}.*{END}", lambda _: table, DOCS.read_text(), flags=re.DOTALL)
        DOCS.write_text(re.sub(f"{REFUSED_BEGIN}.*{REFUSED_END}", lambda _: second, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
