"""Tensor comprehensions: notation, loop nests, schedules, printers, tuner and options cache."""
