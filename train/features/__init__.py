"""How are the features of a frozen encoder kept from stage to stage, where that pays?"""
