"""Run the examples of a Markdown file and compare what their comments claim.

    examples.py FILE

The blocks marked sql, js and python are run in the order of the file, each by a
client of its own, so that nothing is left over from the block before but what
is in the database.  The environment says which database.  The role is "shop",
or "postgres" where the first line of a block is "-- as a superuser".

Before them come the SQL blocks under the heading "Installation" of README.md,
which every page builds on: they create the extension, the role and the tables.
In README.md itself they are moved to the front.

What a block claims is in comments, after a statement in SQL, and in the others
after the call that prints it, which ends its line:

    --  value | value       a row; null is (null)
    --  ID001: message      an error, by its SQLSTATE and the beginning of its
                            message
    --  INSERT 0 2          a command tag
    # text, // text         a line of the output

"..." in a claim stands for anything.  A statement of SQL that claims nothing may
print anything, but must not fail.  Everything else must print just what it claims.

The last line of the output says how many blocks did so.
"""

import os
import re
import subprocess
import sys

PRELUDE = ("README.md", "Installation")
SUPERUSER = "-- as a superuser"
MARK = "@@ end of chunk"


def blocks(path):
    """The blocks of a file: heading, line number, language and text of each."""
    language = heading = None
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if language is None and line.startswith("```"):
                language, start, lines = line[3:].strip(), number, []
            elif language is not None and line.startswith("```"):
                if language in ("sql", "js", "python"):
                    yield heading, start, language, "".join(lines)
                language = None
            elif language is not None:
                lines.append(line)
            elif line.startswith("#"):
                heading = line.strip("# \n")


def prelude():
    """The blocks that come before those of any file."""
    path, section = PRELUDE
    return [(path, number, language, text)
            for heading, number, language, text in blocks(path)
            if heading == section and language == "sql"]


def examples(path):
    """The blocks of a file that are not in the prelude."""
    before = {(file, number) for file, number, _, _ in prelude()}
    return [(path, number, language, text)
            for _, number, language, text in blocks(path)
            if (path, number) not in before]


def matches(claim, line):
    """Whether a line is what a claim says."""
    pattern = ".*".join(re.escape(part) for part in claim.split("..."))
    return re.fullmatch(pattern, line) is not None


def run(command, text, user):
    """The output of a program that gets a text, with its errors among it."""
    result = subprocess.run(command, input=text, text=True, check=False,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=dict(os.environ, PGUSER=user))
    return result.returncode, result.stdout


def chunks(text):
    """The parts of a SQL block: statements, and what the last of them claims."""
    statements, claims = [], []
    for line in text.splitlines():
        claim = re.fullmatch(r"--  (.*)", line)
        if claim:
            claims.append(claim[1])
            continue
        if claims:
            yield "\n".join(statements), claims
            statements, claims = [], []
        statements.append(line)
    if "".join(statements).strip():
        yield "\n".join(statements), claims


def check_sql(text):
    """What is wrong with a SQL block, as a list of lines."""
    user = "postgres" if text.startswith(SUPERUSER) else "shop"
    parts = list(chunks(text))
    script = "\\set VERBOSITY verbose\n\\pset null '(null)'\n"
    for statements, _ in parts:
        script += f"{statements}\n\\echo {MARK}\n"
    _, output = run(["psql", "-X", "-A", "-t", "-F", " | "], script, user)

    outputs = output.split(MARK + "\n")
    if len(outputs) != len(parts) + 1:
        return ["psql did not come to its end", output]

    wrong = []
    for (statements, claims), printed in zip(parts, outputs):
        wrong += check_chunk(statements, claims, printed.splitlines())
    return wrong


def check_chunk(statements, claims, lines):
    errors = [line for line in lines if line.startswith("ERROR:")]
    said = [re.sub(r"^ERROR:  ", "", line) for line in errors]

    if len(claims) == 1 and re.match(r"[0-9A-Z]{5}: ", claims[0]):
        if len(said) == 1 and said[0].startswith(claims[0]):
            return []
        lines = said or lines
    elif not errors and not claims:
        return []
    elif not errors:
        if len(lines) >= len(claims) and all(map(matches, claims, lines[-len(claims):])):
            return []
    return [statements, "claims:", *claims, "but prints:", *lines]


def check_program(command, comment, text):
    """What is wrong with a program, as a list of lines."""
    claims = re.findall(rf"\)\n *{comment} (.*)$", text, re.MULTILINE)
    status, output = run(command, text, "shop")
    lines = output.splitlines()
    if status == 0 and len(lines) == len(claims) and all(map(matches, claims, lines)):
        return []
    return [f"exit status {status}", "claims:", *claims, "but prints:", *lines]


def check(language, text):
    if language == "sql":
        return check_sql(text)
    if language == "python":
        return check_program([sys.executable, "-"], "#", text)
    return check_program(["node", "-"], "//", text)


def main():
    path = sys.argv[1]
    own = examples(path)
    before = prelude()
    passed = failed = 0
    for file, number, language, text in before + own:
        wrong = check(language, text)
        if wrong:
            failed += 1
            print(f"{file}:{number}: not so", *wrong, sep="\n    ")
        elif file == path:
            passed += 1
    print(f"{path}: {passed} passed, {failed} failed")
    return 0 if failed == 0 and passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
