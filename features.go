package layerfs

// Features is what one driver instance can do on its root. The zero value of
// each field is the cautious answer.
type Features struct {
	MaxDepth        int  // layers in one stack; 0 means no limit but memory
	ConstantCreate  bool // Create does not depend on the size of the parent
	SharedPageCache bool // layers on one base share its cached pages
	ReadOnlyViews   bool // frozen layers are read-only for everybody
	NativeChanges   bool // Changes does not walk the whole tree
	NativeDiff      bool // Diff does not walk the whole tree
	Quota           bool // bytes per layer can be limited
	InodeQuota      bool // inodes per layer can be limited
	IDMap           bool // Get can map owners
	Rename          bool // a directory of a lower layer can be renamed (no EXDEV)
	LiveBase        bool // changes of a frozen base show in running layers
	AllXattrs       bool // trusted.*, security.* and user.* are kept
	DeviceNodes     bool // device nodes can be made in a layer

	// Reasons has, for abilities that are missing here but that the
	// mechanism could have, the reason by field name.
	Reasons map[string]string
}
