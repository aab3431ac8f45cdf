#define PIECES kPiecesGeneric
#include "pieces.inl"
