#define PIECES kPiecesAvx2
#include "pieces.inl"
