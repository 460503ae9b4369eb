package archive

import "github.com/layerfs/layerfs/whiteout"

// Short names for what the whiteout package defines.
const (
	aufsPrefix = whiteout.Prefix
	aufsMeta   = whiteout.MetaPrefix
	aufsOpaque = whiteout.OpaqueName
	aufsPlinks = whiteout.PlinkDir

	// plinkTemp keeps the sources of AUFS pseudo-links while a layer is
	// unpacked. It is a name no layer can have.
	plinkTemp = whiteout.MetaPrefix + "layerfs-plnk"
)
