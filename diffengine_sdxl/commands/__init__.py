"""The commands behind tools/: parse, run, print, exit. Nothing below this folder prints or exits."""
