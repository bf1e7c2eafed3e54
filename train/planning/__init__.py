"""What will a run need: parameters, tokens, memory, hours, before any weight is loaded?"""
