"""How are scenes with exact ground truth drawn, described and asked about?"""
