"""Model families: everything that is particular to one, behind one contract."""
