package sys

import (
	"testing"
	"unsafe"
)

// The numbers were printed by a C program from linux/btrfs.h (6.1; the wait
// of 6.13 from its patch) and linux/fsverity.h on x86_64.
func TestBtrfsLayout(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"vol_args", unsafe.Sizeof(BtrfsVolArgs{}), 4096},
		{"vol_args.name", unsafe.Offsetof(BtrfsVolArgs{}.Name), 8},
		{"vol_args_v2", unsafe.Sizeof(BtrfsVolArgsV2{}), 4096},
		{"vol_args_v2.flags", unsafe.Offsetof(BtrfsVolArgsV2{}.Flags), 16},
		{"vol_args_v2.name", unsafe.Offsetof(BtrfsVolArgsV2{}.Name), 56},
		{"search_key", unsafe.Sizeof(BtrfsSearchKey{}), 104},
		{"search_key.min_type", unsafe.Offsetof(BtrfsSearchKey{}.MinType), 56},
		{"search_key.nr_items", unsafe.Offsetof(BtrfsSearchKey{}.Items), 64},
		{"search_args_v2", unsafe.Sizeof(BtrfsSearchArgs{}), 112},
		{"search_header", unsafe.Sizeof(BtrfsSearchHeader{}), 32},
		{"subvol_info", unsafe.Sizeof(BtrfsSubvolInfo{}), 504},
		{"subvol_info.parent_id", unsafe.Offsetof(BtrfsSubvolInfo{}.ParentID), 264},
		{"subvol_info.uuid", unsafe.Offsetof(BtrfsSubvolInfo{}.UUID), 296},
		{"subvol_info.ctransid", unsafe.Offsetof(BtrfsSubvolInfo{}.Ctransid), 344},
		{"subvol_info.ctime", unsafe.Offsetof(BtrfsSubvolInfo{}.Ctime), 376},
		{"subvol_info.otime", unsafe.Offsetof(BtrfsSubvolInfo{}.Otime), 392},
		{"rootref", unsafe.Sizeof(BtrfsRootRefs{}), 4096},
		{"rootref.num_items", unsafe.Offsetof(BtrfsRootRefs{}.Num), 4088},
		{"ino_lookup", unsafe.Sizeof(BtrfsInoLookup{}), 4096},
		{"ino_lookup_user", unsafe.Sizeof(BtrfsInoLookupUser{}), 4096},
		{"ino_lookup_user.path", unsafe.Offsetof(BtrfsInoLookupUser{}.Path), 272},
		{"dev_info", unsafe.Sizeof(BtrfsDevInfo{}), 4096},
		{"dev_info.total_bytes", unsafe.Offsetof(BtrfsDevInfo{}.Total), 32},
		{"dev_info.path", unsafe.Offsetof(BtrfsDevInfo{}.Path), 3072},
		{"fs_info", unsafe.Sizeof(BtrfsFsInfo{}), 1024},
		{"fs_info.nodesize", unsafe.Offsetof(BtrfsFsInfo{}.Nodesize), 32},
		{"fs_info.flags", unsafe.Offsetof(BtrfsFsInfo{}.Flags), 48},
		{"fs_info.metadata_uuid", unsafe.Offsetof(BtrfsFsInfo{}.MetadataUUID), 64},
		{"space_args", unsafe.Sizeof(BtrfsSpaceArgs{}), 16},
		{"space_info", unsafe.Sizeof(BtrfsSpaceInfo{}), 24},
		{"quota_ctl", unsafe.Sizeof(BtrfsQuotaCtl{}), 16},
		{"qgroup_limit", unsafe.Sizeof(BtrfsQgroupLimitArgs{}), 48},
		{"rescan", unsafe.Sizeof(BtrfsRescan{}), 64},
		{"send", unsafe.Sizeof(BtrfsSendArgs{}), 72},
		{"send.parent_root", unsafe.Offsetof(BtrfsSendArgs{}.Parent), 24},
		{"send.version", unsafe.Offsetof(BtrfsSendArgs{}.Version), 40},
		{"received", unsafe.Sizeof(BtrfsReceivedArgs{}), 200},
		{"received.stime", unsafe.Offsetof(BtrfsReceivedArgs{}.Stime), 32},
		{"received.flags", unsafe.Offsetof(BtrfsReceivedArgs{}.Flags), 64},
		{"fsverity_enable", unsafe.Sizeof(FsverityEnable{}), 128},
		{"fsverity_enable.sig_ptr", unsafe.Offsetof(FsverityEnable{}.Sig), 32},
		{"subvol_wait", unsafe.Sizeof(BtrfsSubvolWait{}), 16},
	} {
		if c.got != c.want {
			t.Errorf("%s = %d, want %d", c.name, c.got, c.want)
		}
	}
	if unsafe.Sizeof(uintptr(0)) == 8 {
		if got := unsafe.Sizeof(BtrfsEncodedArgs{}); got != 128 {
			t.Errorf("encoded_io = %d, want 128", got)
		}
		if got := unsafe.Offsetof(BtrfsEncodedArgs{}.Compression); got != 56 {
			t.Errorf("encoded_io.compression = %d, want 56", got)
		}
	}
}

func TestBtrfsNumbers(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uint
	}{
		{"SNAP_DESTROY", BtrfsIocSnapDestroy, 0x5000940f},
		{"SNAP_CREATE_V2", BtrfsIocSnapCreateV2, 0x50009417},
		{"SUBVOL_CREATE_V2", BtrfsIocSubvolCreateV2, 0x50009418},
		{"SNAP_DESTROY_V2", BtrfsIocSnapDestroyV2, 0x5000943f},
		{"TREE_SEARCH_V2", BtrfsIocTreeSearchV2, 0xc0709411},
		{"INO_LOOKUP", BtrfsIocInoLookup, 0xd0009412},
		{"INO_LOOKUP_USER", BtrfsIocInoLookupUser, 0xd000943e},
		{"GET_SUBVOL_INFO", BtrfsIocSubvolInfo, 0x81f8943c},
		{"GET_SUBVOL_ROOTREF", BtrfsIocSubvolRootRef, 0xd000943d},
		{"SUBVOL_GETFLAGS", BtrfsIocSubvolGetFlags, 0x80089419},
		{"SUBVOL_SETFLAGS", BtrfsIocSubvolSetFlags, 0x4008941a},
		{"SYNC", BtrfsIocSync, 0x9408},
		{"START_SYNC", BtrfsIocStartSync, 0x80089418},
		{"WAIT_SYNC", BtrfsIocWaitSync, 0x40089416},
		{"SPACE_INFO", BtrfsIocSpaceInfo, 0xc0109414},
		{"DEV_INFO", BtrfsIocDevInfo, 0xd000941e},
		{"FS_INFO", BtrfsIocFsInfo, 0x8400941f},
		{"QUOTA_CTL", BtrfsIocQuotaCtl, 0xc0109428},
		{"QGROUP_CREATE", BtrfsIocQgroupCreate, 0x4010942a},
		{"QGROUP_LIMIT", BtrfsIocQgroupLimit, 0x8030942b},
		{"QGROUP_ASSIGN", BtrfsIocQgroupAssign, 0x40189429},
		{"QUOTA_RESCAN", BtrfsIocRescan, 0x4040942c},
		{"QUOTA_RESCAN_STATUS", BtrfsIocRescanStatus, 0x8040942d},
		{"SEND", BtrfsIocSend, 0x40489426},
		{"SET_RECEIVED_SUBVOL", BtrfsIocSetReceived, 0xc0c89425},
		{"SUBVOL_SYNC_WAIT", BtrfsIocSubvolSyncWait, 0x40109441},
		{"FS_IOC_ENABLE_VERITY", FsIocEnableVerity, 0x40806685},
	} {
		if c.got != c.want {
			t.Errorf("%s = %#x, want %#x", c.name, c.got, c.want)
		}
	}
}
