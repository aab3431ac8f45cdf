"""Prompts of `trinity bench serve --speculation`, in the manner of what the demo's model has read: sources of Python's library.

Of each kind, what comes next is for a reader plain: an edit repeats a function with a change, a list goes on with records of
the same shape, a passage is quoted before its text goes on. Prose goes on as nobody knows; it is drawn, not the likeliest.
"""

EDIT = (
    '''class Stack:
    def push(self, item):
        """Add an item to the end of the list."""
        if self._closed:
            raise ValueError("I/O operation on closed file")
        with self._lock:
            self._items.append(item)
            self._count = self._count + 1
        return self._count

class Queue:
    def push(self, item):
        """Add an item to the end of the list."""
        if self._closed:
''',
    '''def read_header(self, name, default=None):
    """Return the value of the header with that name."""
    name = name.lower()
    for key, value in self._headers:
        if key.lower() == name:
            return self.policy.header_fetch_parse(key, value)
    return default

def read_header_all(self, name, default=None):
    """Return the value of the header with that name."""
    name = name.lower()
    for key, value in self._headers:
''',
    """    def __lt__(self, other):
        if not isinstance(other, type(self)):
            return NotImplemented
        self._check_version(other)
        return self._ip < other._ip

    def __le__(self, other):
        if not isinstance(other, type(self)):
            return NotImplemented
        self._check_version(other)
        return self._ip <= other._ip

    def __gt__(self, other):
        if not isinstance(other, type(self)):
""",
    """    def test_open(self):
        self.assertEqual(self.file.name, "name")
        self.assertEqual(self.file.mode, "r")
        self.assertRaises(ValueError, self.file.read, 1)
        self.assertRaises(ValueError, self.file.write, 1)

    def test_close(self):
        self.assertEqual(self.file.name, "name")
        self.assertEqual(self.file.mode, "r")
""",
)
JSON = (
    '''RECORDS = [
    {"name": "alpha", "type": "int", "size": 4, "default": None},
    {"name": "beta", "type": "int", "size": 4, "default": None},
    {"name": "gamma", "type": "int", "size": 4, "default": None},
    {"name": "delta", "type": "int", "size": 4, "default": None},
    {"name": "''',
    """{
    "files": [
        {"path": "a.py", "mode": 0, "lines": 10},
        {"path": "b.py", "mode": 0, "lines": 20},
        {"path": "c.py", "mode": 0, "lines": 30},
        {"path": "d.py", "mode": 0, "lines": 40},
""",
    """    'ascii'              : 'ascii',
    'us_ascii'           : 'ascii',
    'iso_8859_1'         : 'latin_1',
    'iso8859_1'          : 'latin_1',
    'iso_8859_2'         : 'iso8859_2',
    'iso8859_2'          : 'iso8859_2',
    'iso_8859_3'         : 'iso8859_3',
""",
    """EVENTS = [
    ('call', 1, 'module'),
    ('line', 2, 'module'),
    ('return', 3, 'module'),
    ('call', 1, 'function'),
    ('line', 2, 'function'),
    ('return', 3, 'function'),
    ('call', 1, '""",
)
QUOTE = (
    '''# "The return value is the number of bytes written, which is always
#  equal to the length of the argument, or an exception is raised."

def write(self, data):
    """Write the data to the file.

    The return value is the number of bytes written, which is always
''',
    '''"""This module defines a class which implements the client side of the
HTTP and HTTPS protocols. It is normally not used directly.
"""

HELP = """This module defines a class which implements the client side of the
''',
    """# Permission to use, copy, modify, and distribute this software and its
# documentation for any purpose and without fee is hereby granted,
# provided that the above copyright notice appear in all copies.

# Permission to use, copy, modify, and distribute this software and its
""",
    """    # If the process has not been started, then there is nothing to wait
    # for, and the exit code is None until somebody starts it again.

    # If the process has not been started, then there is nothing to wait
""",
)
PROSE = (
    '''"""A short introduction.

The reader of this file ''',
    "# The reason why this is done here and not elsewhere is that ",
    '''    """Return a new object for which the ''',
    "# Note: a caller may not rely on ",
)
