"""Which programs compute the selective scan? One module each; `selective_scan.py` chooses."""
