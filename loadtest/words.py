"""Common English words, to make up inputs of a given length."""

_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work night point home water room mother area money story "
    "fact month lot right study book eye job word business issue side kind head house service friend father power hour "
    "game line end member law car city community name president team minute idea kid body information back parent face "
    "others level office door health person art war history party result change morning reason research girl guy "
    "moment air teacher force education foot boy age policy process music market sense nation plan college interest "
    "death experience effect use class control field development role effort rate heart drug show leader light voice "
    "wife whole police mind price report decision son view relationship town road arm difference value building action"
)
WORDS = _TEXT.split()
