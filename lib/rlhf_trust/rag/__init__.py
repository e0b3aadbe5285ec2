"""Answers from documents: are they right, supported by what they cite, and withheld where no
document holds one?"""
