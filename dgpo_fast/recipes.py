"""`python -m dgpo_fast.recipes`: every recipe as a table."""

from dgpo_fast.config.recipes import markdown_table

if __name__ == "__main__":
    print(markdown_table())
