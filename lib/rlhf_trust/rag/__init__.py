"""Answers from given documents: are they right, do they cite what supports them, and are they withheld where nothing does?"""
