"""`python -m website`: writes the generated parts of pages, and the OpenAPI document."""

from website import openapi
from website.reference import PAGES, filled


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page), encoding="utf-8")
    openapi.PATH.write_text(openapi.document(), encoding="utf-8")


if __name__ == "__main__":
    main()
